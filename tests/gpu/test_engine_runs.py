"""Engines built and run for real: needs a CUDA device and tensorrt or tensorrt_rtx."""

import json

import numpy as np
import pytest
import torch

from export.compare import compare
from export.engine import build_engine
from export.graph import to_onnx
from export.runtimes import gpu
from export.runtimes.card import card_path
from export.runtimes.load import load_runtime
from export.runtimes.onnx_session import OnnxSession
from fold.plain import fold_net
from train import run as train
from train.cli import run_command

pytestmark = pytest.mark.skipif(not gpu.num_devices(), reason="no CUDA device: engines cannot be run here")


def write_engine(path, batch):
    engine = build_engine(path, batch=batch)
    out = path.with_suffix(".engine")
    out.write_bytes(engine.content)
    card_path(out).write_text(engine.card.to_json())
    return out


@pytest.mark.parametrize("num", [1, 4, 9])
def test_an_engine_answers_as_the_dirac_net(tmp_path, make_net, make_spec, images, num):
    net = make_net(depth=16)
    path = tmp_path / "plain.onnx"
    path.write_bytes(to_onnx(fold_net(net), make_spec(depth=16), {}).SerializeToString())
    pixels = images(num)
    with torch.no_grad():
        expected = net(torch.from_numpy(pixels)).numpy()
    runtime = load_runtime(write_engine(path, (2, 4, 4)))
    assert compare(("Dirac net", expected), ("engine", runtime(pixels)))
    assert np.array_equal(runtime(pixels), runtime(pixels))


def test_onnx_runtime_uses_the_gpu(tmp_path, make_net, make_spec, images):
    path = tmp_path / "plain.onnx"
    path.write_bytes(to_onnx(fold_net(make_net()), make_spec(), {}).SerializeToString())
    assert "CPU" not in OnnxSession(path).description


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_training_on_the_gpu_learns_digits(tmp_path, capsys, precision):
    argv = f"--device cuda --depth 10 --epochs 4 --precision {precision} --out {tmp_path} --json".split()
    assert run_command(train.command, train.TrainConfig, argv=argv) == 0
    assert json.loads(capsys.readouterr().out)["test_accuracy"] > 0.95
    assert run_command(train.command, train.TrainConfig, argv=[*argv, "--resume"]) == 0
