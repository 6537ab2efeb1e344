"""What is read of a file, and that nothing in it runs."""

import io
import os
import re
import sys

import h5py
import numpy as np
import pytest
import torch
from authors import hickled, optimizer_state, pickled, pickled_by_python_2, trained

from common.refusal import Refusal
from fold.authors.files import read_saved


def assert_same(saved, params, stats):
    numbers = params | stats
    assert saved.numbers.keys() | saved.eyes.keys() == numbers.keys()
    for name, value in (saved.numbers | saved.eyes).items():
        assert (value.device.type, value.dtype) == ("cpu", torch.float32)
        assert torch.equal(value, numbers[name].float()), name


WRITERS = {
    "zip": lambda content: pickled(content),
    "old": lambda content: pickled(content, zipped=False),
    "zip on a GPU": lambda content: pickled(content, device="cuda:0"),
    "old on a GPU": lambda content: pickled(content, zipped=False, device="cuda:3"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_pickles_old_and_new_from_any_device(tmp_path, writer):
    params, stats = trained("first", "cifar")
    content = {"params": params, "stats": stats, "epoch": 3, "optimizer": optimizer_state(params)}
    written = WRITERS[writer](content)
    assert (b"cuda:" in written) == ("GPU" in writer)
    saved = read_saved(tmp_path, written)
    assert not saved.folded
    assert_same(saved, params, stats)


def test_a_pickle_of_2017_under_python_2(tmp_path):
    params, stats = trained("first", "cifar")
    content = {"params": params, "stats": stats, "epoch": 3, "optimizer": {"state": {}}}
    assert_same(read_saved(tmp_path, pickled_by_python_2(content)), params, stats)


@pytest.mark.parametrize(("version", "compression"), [("3.4.9", None), ("3.4.9", "gzip"), ("2.1.0", None)])
def test_hdf5_of_both_generations_of_hickle(tmp_path, version, compression):
    params, stats = trained("notebook", "imagenet")
    written = hickled({"params": params, "stats": stats}, version=version, compression=compression)
    assert_same(read_saved(tmp_path, written), params, stats)


def test_hickle_s_other_ways_to_write_a_key(tmp_path):
    params, stats = trained("first", "cifar")
    unicode = {f"u'{name}'": value for name, value in params.items()}
    assert_same(read_saved(tmp_path, hickled({"params": unicode, "stats": stats}, version="2.1.0")), params, stats)


def test_hdf5_is_read_by_h5py_alone_and_its_absence_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hickle", None)
    written = hickled({"conv.weight": np.zeros((1, 3, 7, 7), np.float32)})
    assert read_saved(tmp_path, written).folded
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(Refusal, match=re.escape("pip install 'diracnet-road[hdf5]'")):
        read_saved(tmp_path, written)


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        {"params": {"conv": torch.zeros(1)}, "extra": _Evil()},
        {"params": _Evil(), "stats": {}},
        {"conv.weight": torch.zeros(1), "features.conv.bias": _Evil()},
        _Evil(),
        torch.nn.Sequential(torch.nn.Linear(1, 1)),
    ],
)
def test_a_pickle_with_anything_else_in_it_is_refused_and_not_executed(tmp_path, monkeypatch, zipped, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=r"not a file of tensors in plain containers.*nothing in it was executed"):
        read_saved(tmp_path / "model.pt7", pickled(content, zipped=zipped))
    assert not (tmp_path / "executed").exists()


def hdf5(fill):
    file = io.BytesIO()
    with h5py.File(file, "w") as root:
        fill(root)
    return file.getvalue()


def pickle_in_hdf5(root):
    """As hickle 2 and 3 write what they have no layout for."""
    dataset = root.create_dataset("data_0/'params'/data_0", data=np.bytes_(b"cposix\nsystem\n(S'mkdir executed'\ntR."))
    dataset.attrs["type"] = ["pickle"]


def linked(root):
    root.create_group("data_0")["conv.weight"] = h5py.ExternalLink("/etc/hostname", "/data_0")


def softly_linked(root):
    root.create_group("data_0")["conv.weight"] = h5py.SoftLink("/data_0")


def round_in_itself(root):
    group = root.create_group("data_0")
    group["again"] = group


def elsewhere(root):
    root.create_dataset("data_0/conv.weight", (4,), np.float32, external=[("/etc/hostname", 0, 16)])


def virtual(root):
    layout = h5py.VirtualLayout((4,), np.float32)
    layout[:] = h5py.VirtualSource("/etc/hostname", "data", (4,))
    root.create_virtual_dataset("data_0/conv.weight", layout)


def huge(root):
    root.create_dataset("data_0/conv.weight", (1 << 40,), np.float32, chunks=(1 << 20,))


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (pickle_in_hdf5, "no text or pickle in it was executed"),
        (linked, "/data_0/conv.weight points to another place"),
        (softly_linked, "/data_0/conv.weight points to another place"),
        (round_in_itself, "/data_0/again is in the file twice"),
        (elsewhere, "/data_0/conv.weight takes its numbers from another file"),
        (virtual, "/data_0/conv.weight takes its numbers from another file"),
        (huge, "/data_0/conv.weight announces 4,398,046,511,104 bytes"),
        (lambda root: None, "has neither a dictionary `params`"),
        (lambda root: root.create_dataset("data_0", data=np.zeros(3)), "holds a Tensor, not the dictionary"),
    ],
)
def test_hdf5_that_hickle_would_not_write_is_refused(tmp_path, monkeypatch, fill, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=re.escape(message)):
        read_saved(tmp_path / "net.hkl", hdf5(fill))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [lambda content: hickled(content), lambda content: pickled(content)])
def test_a_file_cut_short_is_refused(tmp_path, write):
    params, stats = trained("first", "cifar")
    written = write({"params": params, "stats": stats})
    for length in (0, 8, 9, 100, len(written) // 2, len(written) - 40):
        with pytest.raises(Refusal, match="cut short"):
            read_saved(tmp_path / "net", written[:length])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not the dictionary"),
        ({"stats": {"conv": torch.zeros(1)}}, "has no tensors in `params`"),
        ({"params": [1], "stats": {}}, "has no tensors in `params`"),
        ({"epoch": 3, "state_dict": {}}, "has neither a dictionary `params`, as the authors' nets, nor conv.weight"),
        ({"params": {"conv": torch.zeros(1), "note": "text"}}, "not a tensor of finite real numbers: note"),
        ({"params": {"conv": torch.tensor([0, float("nan")])}}, "not a tensor of finite real numbers: conv"),
        ({"params": {"conv": torch.tensor([float("inf")])}}, "not a tensor of finite real numbers: conv"),
        ({"params": {"conv": torch.ones(2, dtype=torch.complex64)}}, "not a tensor of finite real numbers: conv"),
        ({"conv.weight": torch.zeros(1), "fc.bias": torch.tensor(float("nan"))}, "real numbers: fc.bias"),
        (
            {"params": {f"conv{index}": torch.tensor(float("nan")) for index in range(9)}},
            "conv0, conv1, conv2, conv3, conv4 and 4 more",
        ),
        (
            {"params": {"conv": torch.zeros(1)}, "stats": {"eye1_1": torch.tensor(float("nan"))}},
            "not a tensor of finite real numbers: eye1_1",
        ),
    ],
)
def test_what_is_no_layout_is_refused_with_what_is_wrong(tmp_path, content, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        read_saved(tmp_path / "net", pickled(content))
