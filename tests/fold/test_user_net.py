"""fold/run.py with a net of its user's own: what it takes, what it writes, and what it refuses in one line."""

import json
import shutil

import numpy as np
import own_nets
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common.cli import run_command
from common.files import read_labels
from common.refusal import Refusal
from common.spec import Spec
from fold.plain import load_plain
from fold.run import FoldConfig, command
from train.families import build


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder with nets.py and the weights of its first net; the working folder of the test."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(own_nets.__file__, tmp_path / "nets.py")
    save_file(own_nets.moved(own_nets.this_morning()).state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


def run(*argv):
    return run_command(command, FoldConfig, argv=[str(part) for part in argv])


ASKED = ("nets.py:this_morning", "--weights", "weights.safetensors", "--image-size", 33)


def expected(net, images, mean=0.0, std=1.0):
    """By other code than ours: pixels from 0 to 1, then mean and deviation of each channel."""
    x = (images.astype(np.float64) / 255 - np.asarray(mean)) / np.asarray(std)
    with torch.no_grad():
        return net.double()(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()


@pytest.mark.slow
def test_the_file_holds_the_net_and_loads_without_its_module(nets, images, capsys):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    (nets / "labels.txt").write_text("".join(f"kind {i}\n" for i in range(5)))
    said = ("--mean", *mean, "--std", *std, "--resize", 40, "--labels", "labels.txt")
    assert run(*ASKED, *said) == 0
    out = capsys.readouterr().out
    assert "ThisMorning: 11 convolutions before, 8 after" in out
    assert "not merged: body.2.up: not merged with body.2.wide: a convolution with groups" in out
    (nets / "nets.py").unlink()
    plain = load_plain(nets / "plain.safetensors")
    pixels = images(4, 33)
    logits = plain.net(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(logits, expected(own_nets.moved(own_nets.this_morning()), pixels, mean, std), atol=1e-4)
    assert (plain.spec.name, plain.spec.labels[4], plain.spec.image.resize) == ("ThisMorning", "kind 4", 40)
    assert plain.spec.to_dict().keys() == {"net", "image", "labels"}
    fold = plain.provenance["fold"]
    assert (fold["made_by"], fold["convolutions"]) == ("nets.py:this_morning", [11, 8])
    rows = {row["what"] for row in fold["layers"]}
    assert {"stem.large.0", "body.2.wide", "body.3.excite", "logits_"} <= rows


@pytest.mark.slow
def test_what_is_assumed_is_said(nets, capsys):
    assert run(*ASKED) == 0
    out = capsys.readouterr().out
    assert "assumed: --mean 0, --std 1, of pixels from 0 to 1" in out
    assert "images are stretched to 33x33" in out
    assert "no --labels" in out
    assert run("nets.py:this_morning", "--image-size", 24, 31) == 0
    assert "no --weights: nets.py:this_morning keeps its initial weights, seed 0" in capsys.readouterr().out
    assert load_plain(nets / "plain.safetensors").spec.image.width == 31


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"module." + name: tensor for name, tensor in state.items()}},
        lambda state: {"model_state_dict": {"_orig_mod." + name: tensor for name, tensor in state.items()}},
    ],
)
def test_state_dicts_are_found_where_training_scripts_put_them(nets, wrap, images):
    net = own_nets.moved(own_nets.this_morning())
    torch.save(wrap(net.state_dict()), nets / "weights.pt")
    assert run("nets.py:this_morning", "--weights", "weights.pt", "--image-size", 16) == 0
    pixels = images(2, 16)
    logits = load_plain(nets / "plain.safetensors").net(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(logits, expected(net, pixels), atol=1e-4)


@pytest.mark.slow
def test_the_proof_reads_a_folder_of_images(nets, capsys):
    (nets / "photographs" / "inner").mkdir(parents=True)
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (50, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(nets / "photographs" / "inner" / f"{index}.png")
    assert run(*ASKED, "--data-dir", "photographs", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["logits"]
    assert {(row["images"], row["num_images"]) for row in rows} == {("random", 8), ("real", 3)}
    (nets / "photographs" / "inner" / "0.png").write_bytes(b"no image")
    assert run(*ASKED, "--data-dir", "photographs") == 2
    assert "0.png: not a PNG" in capsys.readouterr().err
    (nets / "empty").mkdir()
    assert run(*ASKED, "--data-dir", "empty") == 2
    assert " images in empty" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_users_file_prints_is_not_in_the_result(nets, capsys):
    (nets / "nets.py").write_text((nets / "nets.py").read_text() + "\nprint('hello')\n")
    assert run(*ASKED, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["out"] == "plain.safetensors"
    assert "hello" in captured.err


@pytest.mark.slow
def test_a_net_of_this_project_that_its_user_builds_normalizes_by_itself(tmp_path, monkeypatch, make_spec, images):
    spec = make_spec()
    (tmp_path / "nets.py").write_text(
        "from train.families import build\nfrom common.spec import Spec\n"
        f"def make():\n    return build(Spec.from_json({spec.to_json()!r}))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run("nets.py", "--image-size", 8) == 0
    plain, pixels = load_plain(tmp_path / "plain.safetensors"), torch.from_numpy(images())
    torch.manual_seed(0)
    with torch.no_grad():
        logits = build(Spec.from_json(spec.to_json())).eval()(pixels)
    torch.testing.assert_close(plain.net(pixels), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(plain.spec.image.mean, spec.image.mean, rtol=1e-6)
    np.testing.assert_allclose(plain.spec.image.std, spec.image.std, rtol=1e-6)


def test_one_channel_is_found_where_the_net_takes_no_other(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(
        "from torch.nn import *\ndef make():\n    return Sequential(Conv2d(1, 4, 3), AdaptiveAvgPool2d(1), Flatten())\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run("nets.py:make", "--image-size", 9) == 0
    assert load_plain(tmp_path / "plain.safetensors").spec.image.channels == 1


@pytest.mark.slow
def test_a_forward_may_flatten_with_a_view(tmp_path, monkeypatch, images):
    """PyTorch's own images are contiguous, and `view` refuses others."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.head = nn.Conv2d(3, 4, 3, 2), nn.Linear(64, 5)\n"
        "    def forward(self, x):\n"
        "        x = self.conv(x).relu()\n"
        "        return self.head(x.view(x.size(0), -1))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run("nets.py:Net", "--image-size", 9) == 0
    plain, pixels = load_plain(tmp_path / "plain.safetensors"), images(3, 9)
    assert plain.net(torch.from_numpy(pixels)).shape == (3, 5)


BAD = """
import torch
from torch import nn
from torch.nn import functional as F
def net(forward):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
            self.kept, self.inner = nn.BatchNorm2d(3), Inner()
        def forward(self, x):
            return forward(self, x)
    return Net()
class Inner(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
def flow(): return net(lambda self, x: self.inner(self.conv(x)).mean((2, 3)))
def statistics(): return net(lambda self, x: self.bn(self.conv(x)).mean((2, 3)))
def training(): return net(lambda self, x: batch_norm(x, self.kept).mean((2, 3)))
def batch_norm(x, kept): return F.batch_norm(x, kept.running_mean, kept.running_var, training=True)
def unlisted(): return nn.Sequential(nn.Softsign(), nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def image(): return nn.Sequential(nn.Conv2d(3, 4, 3))
def two(): return net(lambda self, x: (x, x))
def one_value(): return nn.Sequential(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def signal(): return nn.Sequential(nn.Conv1d(1, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
def number(): return 3
def kind(): return Inner
def arguments(width): return Inner()
def raises(): raise KeyError("width")
def leaves(): raise SystemExit(3)
"""
REFUSED = {
    "bad.py:flow": "Net cannot be traced, at or after inner (TraceError",
    "bad.py:statistics": "Net cannot be folded: bn (BatchNorm2d: batch norm without running statistics depends on the",
    "bad.py:training": "(batch norm in training mode depends on the batch: call net.eval())",
    "bad.py:unlisted": "0 (Softsign), 1 (Upsample); docs/fold-your-own-net.md says what can be folded",
    "bad.py:image": "the net answers [N, 4, 7, 7] to images of 3 channels of 9x9; a classifier answers [N, classes]",
    "bad.py:two": "the net answers a tuple; a classifier answers one tensor, [N, classes]",
    "bad.py:one_value": "the net answers [N, 1] to images",
    "bad.py:signal": "the net does not take images of 3 channels of 9x9: RuntimeError: Expected",
    "bad.py:number": "bad.py: number returns an object of the type int; it must return a torch.nn.Module",
    "bad.py:kind": "bad.py: kind returns the class Inner: call it",
    "bad.py:arguments": "arguments is called without arguments: missing a required argument: 'width'",
    "bad.py:raises": "bad.py, line 29: raises raises KeyError: 'width'",
    "bad.py:leaves": "bad.py, line 30: leaves raises SystemExit: 3",
    "bad.py": "bad.py has no function make; it defines net, Inner, flow, statistics, training: name the one that",
    "none.py:make": "none.py:make is neither a checkpoint (.pt) nor FILE.py:FUNCTION of a file that exists",
}


@pytest.mark.parametrize("where", REFUSED)
def test_a_net_that_cannot_be_folded_is_refused_in_one_line(where, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    assert run(where, "--image-size", 9) == 2
    error = capsys.readouterr().err
    assert REFUSED[where] in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plain.safetensors").exists()


IMPORTS = {
    "import torch\nW = torch.load('w.pt')\n": "nets.py, line 2, reads w.pt when it is imported: let it define",
    "import json, pathlib\nC = json.loads(pathlib.Path('c.json').read_text())\n": "line 2, reads c.json when it is",
    "def make(:\n": "nets.py, line 1: the file cannot be imported: SyntaxError",
    "x = 1\nraise ValueError('no width')\n": "nets.py, line 2: the file cannot be imported: ValueError: no width",
    "import sys\nsys.exit('bye')\n": "nets.py, line 2: the file cannot be imported: SystemExit: bye",
    "import nothing_of_that_name\n": "nets.py, line 1: the file cannot be imported: ModuleNotFoundError",
}


@pytest.mark.parametrize("text", IMPORTS)
def test_a_file_that_does_more_than_define_nets_is_refused(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(text)
    (tmp_path / "c.json").write_text("{}")
    assert run("nets.py:make", "--image-size", 9) == 2
    assert IMPORTS[text] in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_beside_it_may_be_imported(nets):
    (nets / "other.py").write_text("import nets\ndef make():\n    return nets.this_morning()\n")
    assert run("other.py:make", "--image-size", 12) == 0


def test_weights_that_do_not_fit_are_named(nets, capsys):
    state = own_nets.this_morning().state_dict()
    del state["stem.large.0.weight"]
    state |= {"logits.weight": torch.zeros(9, 64), "head.weight": torch.zeros(1)}
    torch.save(state, nets / "weights.pt")
    again = ("nets.py:this_morning", "--image-size", 16, "--weights", "weights.pt")
    assert run(*again) == 2
    error = capsys.readouterr().err
    assert "weights.pt does not fit the net: " in error
    assert "stem.large.0.weight is missing" in error
    assert "head.weight is not part of it" in error
    assert "logits.weight is [9, 64], must be [5, 64]" in error
    bad = {
        "a net": (own_nets.Gate(4), "cannot be read as weights"),
        "a list": ([1, 2], "holds a list, not a state dict"),
        "other keys": ({"epoch": 3}, "holds epoch, and no state dict under state_dict, model_state_dict, model, net"),
        "NaN": (
            {**own_nets.this_morning().state_dict(), "logits.bias": torch.full((5,), torch.nan)},
            "logits.bias: the",
        ),
    }
    for content, message in bad.values():
        torch.save(content, nets / "weights.pt")
        assert run(*again) == 2
        assert message in capsys.readouterr().err
    (nets / "weights.safetensors").write_bytes(b"cut short")
    assert run(*ASKED) == 2
    assert "weights.safetensors is not a valid safetensors file" in capsys.readouterr().err


def test_flags_that_do_not_go_together_are_refused(nets, capsys):
    (nets / "labels.txt").write_text("a\nb\n")
    for argv, message in {
        (): "name one net",
        ("nets.py", "--timm", "resnet18"): "name one net",
        ("checkpoint.pt", "--image-size", "9"): "leave out --image-size: checkpoint.pt is a checkpoint",
        ("nets.py:this_morning",): "say how large the net's images are: --image-size 224",
        (*ASKED, "--labels", "labels.txt"): "the net has 5 classes, and there are 2 labels",
        (*ASKED, "--mean", "0.5"): "the net does not take images of 1 channel of 33x33",
        (*ASKED, "--mean", "0.5", "--std", "1", "1", "1"): "mean and std need 3 values each",
        (*ASKED[:-1], "0"): "must be at least 1",
    }.items():
        assert run(*argv) == 2
        assert message.split(",")[0] in capsys.readouterr().err
    with pytest.raises(Refusal, match="not a text file in UTF-8"):
        read_labels(nets / "weights.safetensors")


@pytest.mark.slow
def test_timm_says_how_its_net_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("--timm", "test_resnet", "--image-size", 64) == 0
    spec = load_plain(tmp_path / "plain.safetensors").spec
    assert (spec.name, len(spec.labels)) == ("test_resnet", 1000)
    assert (spec.image.height, len(spec.image.mean)) == (64, 3)
    assert run("--timm", "repvg_a0") == 2
    assert "timm has no net repvg_a0; similar are repvgg_a0" in capsys.readouterr().err
