"""Nets that this project has never seen walk the road by its commands, and are answered as their own code answers."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import own_nets
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from starlette.testclient import TestClient

from common.cli import run_command
from export import parity, to_onnx, to_trt
from export.model_file.engine_card import read_card
from export.runtimes.onnx_session import OnnxSession
from export.runtimes.saturation import may_saturate
from fold import run as fold
from fold.plain import load_plain
from serve.request.app import make_app
from serve.request.limits import Limits

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
HEIGHT, WIDTH = 33, 30
# Small nets of timm: branches, gates, layer scale, depthwise convolutions, plain residual nets. 64 pixels, 10 classes.
TIMM = (
    "test_resnet",
    "test_byobnet",
    "repvgg_a0",
    "mobileone_s0",
    "repghostnet_050",
    "resnet10t",
    "mobilenetv3_small_050",
)


def run(command, config, *argv):
    return run_command(command, config, argv=[str(part) for part in argv])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(own_nets.__file__, tmp_path / "nets.py")
    return tmp_path


def folded(name, net):
    """plain.safetensors of a net of nets.py."""
    save_file(net.state_dict(), "weights.safetensors")
    said = ("--weights", "weights.safetensors", "--image-size", HEIGHT, WIDTH, "--mean", *MEAN, "--std", *STD)
    assert run(fold.command, fold.FoldConfig, f"nets.py:{name}", *said) == 0


def pictures(num=3, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(5).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def probabilities(net, images, mean=MEAN, std=STD):
    """By the net's own code, in float64."""
    x = (images / 255 - np.asarray(mean)) / np.asarray(std)
    with torch.no_grad():
        return net.double()(torch.from_numpy(x.transpose(0, 3, 1, 2))).softmax(1).numpy()


def served(path, images):
    """[N, K] over HTTP, and what GET /model says."""
    with TestClient(make_app(OnnxSession(path), Limits())) as client:
        card = client.get("/model").json()
        rows = np.zeros((len(images), len(card["labels"])))
        for row, image in zip(rows, images, strict=True):
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="PNG")
            answer = client.post("/predict?top_k=1000", content=file.getvalue(), headers={"Content-Type": "image/png"})
            for guess in answer.json()["results"][0]["top"]:
                row[guess["index"]] = guess["probability"]
    return rows, card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["this_morning", "everything", "chain"])
def test_a_net_written_this_morning_walks_the_whole_road(name, folder, capsys):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")
    net = own_nets.moved(getattr(own_nets, name)())
    folded(name, net)
    (folder / "nets.py").unlink()
    assert run(to_onnx.command, to_onnx.ToOnnxConfig, "plain.safetensors") == 0
    assert (
        run(to_onnx.command, to_onnx.ToOnnxConfig, "plain.safetensors", "--precision", "fp16", "--out", "h.onnx") == 0
    )
    assert run(parity.command, parity.ParityConfig, "plain.onnx", "--against", "plain.safetensors", "--layers") == 0
    assert run(parity.command, parity.ParityConfig, "h.onnx", "--against", "plain.safetensors", "--layers") == 0
    for form in ("plain", "h"):
        assert run(to_trt.command, to_trt.ToTrtConfig, f"{form}.onnx") == 0
        assert read_card(folder / f"{form}.engine").spec == load_plain(folder / "plain.safetensors").spec
    rows, card = served(folder / "plain.onnx", pictures())
    np.testing.assert_allclose(rows, probabilities(net, pictures()), atol=1e-5)
    assert card["net"] == card["name"] == load_plain(folder / "plain.safetensors").spec.net
    assert not card.keys() & {"family", "depth", "width", "nonlinearity", "parameterization", "reading"}
    assert card["provenance"]["fold"]["made_by"] == f"nets.py:{name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_nets_of_timm_walk_the_whole_road(name, folder):
    timm = pytest.importorskip("timm")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")
    net = own_nets.moved(timm.create_model(name, num_classes=10))
    torch.save({"state_dict": net.state_dict()}, folder / "weights.pt")
    (folder / "labels.txt").write_text("".join(f"kind {i}\n" for i in range(10)))
    said = ("--weights", "weights.pt", "--image-size", 64, "--labels", "labels.txt")
    assert run(fold.command, fold.FoldConfig, "--timm", name, *said) == 0
    assert run(to_onnx.command, to_onnx.ToOnnxConfig, "plain.safetensors") == 0
    assert run(parity.command, parity.ParityConfig, "plain.onnx", "--against", "plain.safetensors", "--layers") == 0
    assert run(to_trt.command, to_trt.ToTrtConfig, "plain.onnx") == 0
    config, images = net.pretrained_cfg, pictures(2, 64, 64)
    rows, card = served(folder / "plain.onnx", images)
    np.testing.assert_allclose(rows, probabilities(net, images, config["mean"], config["std"]), atol=1e-4)
    assert card["net"] == name


@pytest.fixture
def labelled(folder):
    """Three images of each class that `this_morning` and `chain` have."""
    for kind in range(5):
        (folder / "photographs" / f"class {kind}").mkdir(parents=True)
        for index, image in enumerate(pictures(12, 32, 32)):
            Image.fromarray(image).save(folder / "photographs" / f"class {kind}" / f"{kind}{index}.png")
    return folder / "photographs"


@pytest.mark.slow
def test_eight_bits(folder, labelled, capsys):
    """For ONNX Runtime all convolutions but the stem multiply integers; for TensorRT an engine is built."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")
    for name in ("chain", "this_morning"):
        save_file(own_nets.moved(getattr(own_nets, name)()).state_dict(), "weights.safetensors")
        said = ("--weights", "weights.safetensors", "--image-size", 32, "--out", f"{name}.safetensors")
        assert run(fold.command, fold.FoldConfig, f"nets.py:{name}", *said) == 0
        asked = ("--precision", "int8", "--dataset", "folder", "--data-dir", labelled, "--allow-drop")
        plain = (to_onnx.command, to_onnx.ToOnnxConfig, f"{name}.safetensors", *asked)
        assert run(*plain, "--target", "tensorrt", "--out", f"{name}-trt.onnx") == 0
        assert run(to_trt.command, to_trt.ToTrtConfig, f"{name}-trt.onnx") == 0
        capsys.readouterr()
        assert run(*plain, "--out", "int8.onnx") == 0
        assert may_saturate(Path("int8.onnx"), Path("int8.onnx").read_bytes()) == []
        assert convolutions_that_run("int8.onnx") == {"Conv": 1, "QLinearConv": onnx_count("int8.onnx") - 1}
        against = ("--against", f"{name}.safetensors", "--data-dir", labelled, "--json")
        run(parity.command, parity.ParityConfig, "int8.onnx", *against)
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["parity"]
        assert {row["images"] for row in rows} == {"real", "random", "extreme"}
        assert all(row["rms"] < 0.1 for row in rows if row["images"] == "real")


def onnx_count(path):
    return sum(node.op_type.endswith("Conv") for node in onnx.load(path).graph.node)


def convolutions_that_run(path):
    """What ONNX Runtime makes of a graph's convolutions."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = "optimized.onnx", 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load("optimized.onnx").graph.node]
    return {kind: kinds.count(kind) for kind in ("Conv", "QLinearConv")}


@pytest.mark.slow
def test_parity_takes_a_folder_of_images(folder, labelled, capsys):
    folded("chain", own_nets.moved(own_nets.chain()))
    assert run(to_onnx.command, to_onnx.ToOnnxConfig, "plain.safetensors", "--lowering", "auto") == 0
    against = ("--against", "plain.safetensors", "--data-dir", labelled, "--images", 7)
    assert run(parity.command, parity.ParityConfig, "plain.onnx", *against) == 0
    assert "7 real" in capsys.readouterr().out


def test_a_lowering_for_chains_is_refused_for_another_net(folder, capsys):
    folded("this_morning", own_nets.moved(own_nets.this_morning()))
    assert run(to_onnx.command, to_onnx.ToOnnxConfig, "plain.safetensors", "--lowering", "skip") == 2
    assert "lowering skip is for chains" in capsys.readouterr().err
    assert not Path("plain.onnx").exists()
