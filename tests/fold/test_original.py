"""The command, and each kind of file of the authors' down the whole road."""

import numpy as np
import pytest
import reference
import torch
from authors import first_release, folded_first, folded_second, notebook, published_second, second_release
from starlette.testclient import TestClient

from common.cli import run_command
from export.runtimes.onnx_session import OnnxSession
from export.to_onnx import ToOnnxConfig
from export.to_onnx import command as to_onnx
from fold.original import OriginalConfig, command
from fold.plain import load_plain
from fold.run import FoldConfig
from fold.run import command as fold
from serve.request.app import make_app
from serve.request.limits import Limits
from train.checkpoint import load_checkpoint, load_net

# A float32 net of 18 layers strays from its float64 form by a few 1e-7 of its output; another δ, a lost ReLU or a
# half swapped for the other change the first digit.
TOLERANCE = 1e-5
KINDS = {
    "first-release": (first_release, "model.pt7", "DiracNet-10-0.25", ("dirac", "repeated"), 32),
    "first-release-imagenet": (
        lambda: first_release("imagenet", num_classes=7),
        "model.pt7",
        "DiracNet-18-0.0625",
        ("dirac", "repeated"),
        32,
    ),
    "notebook": (notebook, "diracnet-18-0.75-br.hkl", "DiracNet-18-0.0625", ("per-output-b", "repeated"), 32),
    "published-second": (
        published_second,
        "diracnet18-v2_checkpoint.pth",
        "DiracNet-18-0.0625",
        ("per-channel", "first"),
        32,
    ),
    "second-release": (second_release, "model.pt7", "DiracNet-10-0.25", ("per-channel", "first"), 32),
    "folded-first": (
        folded_first,
        "diracnet-18-0.75-br-export.hkl",
        "DiracNet-18-0.0625",
        ("per-output-b", "repeated"),
        32,
    ),
    "folded-second": (
        folded_second,
        "diracnet18v2folded-a2174e15.pth",
        "DiracNet-18-0.0625",
        ("per-channel", "first"),
        32,
    ),
}


def original(*argv):
    return run_command(command, OriginalConfig, argv=list(map(str, argv)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_authors_answers_as_their_definition_at_every_stage(tmp_path, capsys, kind):
    make, file, name, form, size = KINDS[kind]
    content, numbers, release = make()
    (tmp_path / file).write_bytes(content)
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    expected = reference.AuthorsNet(numbers, release)(images)

    def check(stage, logits):
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE, f"{stage}: {error:.1e}"

    plain = tmp_path / "plain.safetensors"
    folded = kind.startswith("folded")
    out = plain if folded else tmp_path / "checkpoint.pt"
    assert original(tmp_path / file, "--out", out, "--image-size", size) == 0
    assert f"wrote {out}: {name}, " in capsys.readouterr().out
    if not folded:
        with torch.no_grad():
            check("imported", load_net(load_checkpoint(out))(torch.from_numpy(images)).numpy())
        assert run_command(fold, FoldConfig, argv=[str(out)]) == 0
    loaded = load_plain(plain)
    assert (loaded.spec.name, (loaded.spec.parameterization, loaded.spec.delta)) == (name, form)
    with torch.no_grad():
        check("plain", loaded.net(torch.from_numpy(images)).numpy())
    assert run_command(to_onnx, ToOnnxConfig, argv=[str(plain)]) == 0
    runtime = OnnxSession(tmp_path / "plain.onnx")
    check("ONNX", runtime(images))
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()}
    with TestClient(make_app(runtime, Limits())) as client:
        answer = client.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]}).json()
    (output,) = answer["outputs"]
    check("served", np.reshape(output["data"], output["shape"]))


def test_a_folded_net_says_what_it_cannot_prove_and_how_an_image_is_prepared(tmp_path, capsys):
    (tmp_path / "net.pth").write_bytes(folded_second(num_classes=1000)[0])
    assert original(tmp_path / "net.pth", "--out", tmp_path / "plain.safetensors") == 0
    assert "without the Dirac net, the fold cannot be verified" in capsys.readouterr().out
    plain = load_plain(tmp_path / "plain.safetensors")
    assert plain.provenance["fold"]["by"] == "the authors"
    assert "cannot be shown" in plain.provenance["fold"]["not_proven"]
    assert plain.provenance["training"]["authors_file"] == "net.pth"
    image = plain.spec.image
    assert (image.resize, image.height, image.width) == (256, 224, 224)
    assert (image.mean, image.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert plain.spec.labels[0] == "tench"


def test_the_command_writes_a_checkpoint_that_folds_like_any_other(tmp_path, capsys):
    (tmp_path / "model.pt7").write_bytes(first_release()[0])
    out = tmp_path / "checkpoint.pt"
    assert original(tmp_path / "model.pt7", "--out", out) == 0
    assert "DiracNet-10-0.25, cifar, ncrelu, dirac, 10 classes" in capsys.readouterr().out
    assert load_checkpoint(out).config["dataset"] == "cifar10"
    assert run_command(fold, FoldConfig, argv=[str(out)]) == 0
    provenance = load_plain(tmp_path / "plain.safetensors").provenance
    assert len(provenance["training"]["authors_sha256"]) == 64


@pytest.mark.parametrize(
    ("make", "out", "message"),
    [
        (first_release, "plain.safetensors", "is not folded: --out must end in .pt, got"),
        (folded_second, "checkpoint.pt", "is folded already: --out must end in .safetensors, got"),
    ],
)
def test_another_kind_of_file_than_the_name_says_is_not_written(tmp_path, capsys, make, out, message):
    (tmp_path / "net").write_bytes(make()[0])
    assert original(tmp_path / "net", "--out", tmp_path / out) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize(("make", "name"), [(first_release, "model.pt"), (folded_second, "net.safetensors")])
def test_the_authors_file_is_never_overwritten(tmp_path, capsys, make, name):
    path = tmp_path / name
    path.write_bytes(make()[0])
    before = path.read_bytes()
    assert original(path, "--out", path) == 2
    assert "is the authors' file itself" in capsys.readouterr().err
    assert path.read_bytes() == before
