"""MNN answers as the Dirac net does, and refuses what it would answer wrongly or die of."""

import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
import torch

from common.files import sha256
from common.refusal import Refusal
from export.compare import TOLERANCES, compare
from export.graphs.graph import to_onnx
from export.model_file.onnx_reader import read_header
from export.runtimes.load import load_runtime
from export.runtimes.mnn_module import MnnModule
from fold.graph import fold
from fold.lower import lower
from fold.lowerings import LOWERINGS


@pytest.fixture
def edit(write_onnx, tmp_path):
    """`edit(change)`: the file of a small net after `change(model)`."""

    def edit(change):
        _, path = write_onnx()
        model = onnx.load(path)
        change(model)
        onnx.save(model, tmp_path / "edited.onnx")
        return tmp_path / "edited.onnx"

    return edit


def test_every_family_answers_as_its_dirac_net(write_onnx, images, row):
    net, path = write_onnx(**row)
    pixels = images(num=7, size=row.get("size", 8))
    expected = net(torch.from_numpy(pixels)).detach().numpy()
    assert compare(("Dirac net", expected), ("MNN", MnnModule(path)(pixels)), tolerance=TOLERANCES["fp32"])


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_lowering_answers_as_its_dirac_net(tmp_path, make_net, make_spec, images, lowering):
    net, path = make_net(), tmp_path / "plain.onnx"
    path.write_bytes(to_onnx(lower(fold(net), lowering), make_spec(), {}).SerializeToString())
    expected = net(torch.from_numpy(images())).detach().numpy()
    assert compare(("Dirac net", expected), ("MNN", MnnModule(path)(images())), tolerance=TOLERANCES["fp32"])


def test_it_says_what_it_is_like_any_runtime(write_onnx, make_spec):
    _, path = write_onnx()
    runtime = load_runtime(path, name="mnn")
    assert runtime.model == load_runtime(path).model
    assert (runtime.model.digest, runtime.model.spec) == (sha256(path.read_bytes()), make_spec())
    assert runtime.library.startswith("MNN 3.")
    descriptions = [MnnModule(path, num_threads=num).description for num in (1, 2)]
    assert descriptions == ["MNN, 1 process", "MNN, 2 processes"]


def test_any_batch_from_any_thread_has_the_same_answers(write_onnx, images):
    """Convolutions of other batch sizes may sum in another order, so by tolerance."""
    runtime, pixels, found = MnnModule(write_onnx()[1]), images(num=9), []
    whole = runtime(pixels)
    thread = threading.Thread(target=lambda: found.extend(runtime(pixels[start::2]) for start in (0, 1)))
    thread.start()
    thread.join()
    for start, part in enumerate(found):
        assert compare(("whole", whole[start::2]), ("part", part))
    np.testing.assert_array_equal(runtime(pixels), whole)  # an earlier answer is a copy, and the same again


def test_nothing_is_printed_and_no_file_is_left(write_onnx, tmp_path):
    _, path = write_onnx()
    program = f"from pathlib import Path; from export.runtimes.mnn_module import MnnModule as f; f(Path({str(path)!r}))"
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = {"TMPDIR": str(folder), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == (b"", b"")
    assert not list(folder.iterdir())


def dangle(model):
    """Without a node, the next one reads a tensor that nothing writes: the converter dies of it."""
    del model.graph.node[3]


def unknown(model):
    model.graph.node[3].op_type = "Unknown"


def test_a_damaged_file_is_refused_in_one_line(edit, write_onnx, tmp_path):
    for change in (dangle, unknown):
        with pytest.raises(Refusal, match="MNN's converter refuses it"):
            MnnModule(edit(change))
    content = write_onnx()[1].read_bytes()
    for damaged in (b"text", content[:-1], content[: len(content) // 2], b"\xff" * 40):
        (tmp_path / "damaged.onnx").write_bytes(damaged)
        with pytest.raises(Refusal, match="is damaged; export it again"):
            MnnModule(tmp_path / "damaged.onnx")


def test_what_it_would_not_run_as_it_is_meant_is_refused(edit, write_foreign):
    with pytest.raises(Refusal, match="is not a model of this project"):
        MnnModule(write_foreign())

    def contribute(model):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))

    with pytest.raises(Refusal, match="operators that MNN does not run"):
        MnnModule(edit(contribute))

    def record_int8(model):
        next(
            entry for entry in model.metadata_props if entry.key == "provenance"
        ).value = '{"export": {"precision": "int8"}}'

    with pytest.raises(Refusal, match="is int8 with operators that MNN does not run"):
        MnnModule(edit(record_int8))


def test_where_it_cannot_run_it_says_so(write_onnx, monkeypatch):
    _, path = write_onnx()
    with pytest.raises(Refusal, match="MNN runs only on the CPU"):
        load_runtime(path, name="mnn", device=0)
    with pytest.raises(Refusal, match=r"tensorrt does not run .*plain\.onnx; \.onnx files are for onnxruntime or mnn"):
        load_runtime(path, name="tensorrt")
    with monkeypatch.context() as endless:
        endless.setattr("export.runtimes.mnn_module._CONVERT", "import threading; threading.Event().wait()")
        endless.setattr("export.runtimes.mnn_module._CONVERT_S", 0.1)
        with pytest.raises(Refusal, match="MNN's converter does not finish"):
            MnnModule(path)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(Refusal, match=r"cannot be loaded by MNN: converting it in a temporary folder fails: .*nowhere"):
        MnnModule(path)
    monkeypatch.setattr("export.runtimes.mnn_module.find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"MNN is not installed here: pip install '\.\[mnn\]'"):
        MnnModule(path)


def test_the_header_is_what_onnx_reads(write_onnx):
    content = write_onnx()[1].read_bytes()
    model, header = onnx.load_model_from_string(content), read_header("plain.onnx", content)
    assert header.metadata == {entry.key: entry.value for entry in model.metadata_props}
    assert header.domains == ("",)
