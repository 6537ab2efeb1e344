"""Engines built, inspected and run for real: needs a CUDA device and tensorrt or tensorrt_rtx."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from common.cli import run_command
from common.refusal import Refusal
from export import to_trt
from export.compare import TOLERANCES, compare
from export.engines.engine import build_engine, choose_builder
from export.graphs.graph import to_onnx
from export.model_file.engine_card import card_path, layers_path
from export.runtimes import gpu
from export.runtimes.load import load_runtime
from export.runtimes.onnx_session import OnnxSession, loadable_providers
from fold.graph import fold
from train import run as train

pytestmark = pytest.mark.skipif(not gpu.num_devices(), reason="no CUDA device: engines cannot be run here")


def write_onnx(path, net, spec):
    path.write_bytes(to_onnx(fold(net), spec, {}).SerializeToString())
    return path


@pytest.fixture
def builder(tmp_path, make_net, make_spec):
    """Skips where there is none, or none for this GPU: tensorrt_rtx builds nothing for an H100."""
    if not any(map(importlib.util.find_spec, ("tensorrt", "tensorrt_rtx"))):
        pytest.skip("no TensorRT: engines cannot be built")
    path = write_onnx(tmp_path / "first.onnx", make_net(), make_spec())
    try:
        build_engine(path, batch=(1, 1, 1))
    except Refusal as refusal:
        if "builds for compute capability" not in str(refusal):
            raise
        pytest.skip(str(refusal))


def write_engine(path, batch):
    engine = build_engine(path, batch=batch)
    out = path.with_suffix(".engine")
    out.write_bytes(engine.content)
    card_path(out).write_text(engine.card.to_json())
    return out


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize("num", [1, 4, 9])
def test_an_engine_answers_as_the_dirac_net(tmp_path, make_net, make_spec, images, num):
    net = make_net(depth=16)
    path = write_onnx(tmp_path / "plain.onnx", net, make_spec(depth=16))
    pixels = images(num)
    with torch.no_grad():
        expected = net(torch.from_numpy(pixels)).numpy()
    runtime = load_runtime(write_engine(path, (2, 4, 4)))
    assert compare(("Dirac net", expected), ("engine", runtime(pixels)))
    assert np.array_equal(runtime(pixels), runtime(pixels))


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize("flags", [["--refittable"], ["--workspace", "512"], ["--version-compatible"]])
def test_engines_of_every_kind_answer_alike(tmp_path, capsys, make_net, make_spec, images, flags):
    net, pixels = make_net(), images(4)
    path = write_onnx(tmp_path / "plain.onnx", net, make_spec())
    status = run_command(to_trt.command, to_trt.ToTrtConfig, argv=[str(path), "--batch", "1", "2", "4", *flags])
    if status == 2 and "lean runtime" in (error := capsys.readouterr().err):
        pytest.skip(error)
    assert status == 0
    with torch.no_grad():
        expected = net(torch.from_numpy(pixels)).numpy()
    assert compare(("Dirac net", expected), ("engine", load_runtime(path.with_suffix(".engine"))(pixels)))


@pytest.mark.usefixtures("builder")
def test_layers_are_written_beside_the_engine(tmp_path, make_net, make_spec):
    path = write_onnx(tmp_path / "plain.onnx", make_net(), make_spec())
    assert run_command(to_trt.command, to_trt.ToTrtConfig, argv=[str(path)]) == 0
    layers = json.loads(layers_path(path.with_suffix(".engine")).read_text())["Layers"]
    assert layers
    assert "stem.conv" in json.dumps(layers)


@pytest.mark.usefixtures("builder")
def test_timings_are_kept_and_those_of_another_machine_are_refused(tmp_path, capsys, make_net, make_spec):
    if choose_builder() != "tensorrt":
        pytest.skip("tensorrt is not installed: tensorrt_rtx keeps no timings")
    path, timings = write_onnx(tmp_path / "plain.onnx", make_net(), make_spec()), tmp_path / "timings"
    argv = [str(path), "--timing-cache", str(timings)]
    for _ in range(2):
        assert run_command(to_trt.command, to_trt.ToTrtConfig, argv=argv) == 0
        assert timings.stat().st_size > 100
    timings.write_bytes(b"timings of another machine")
    assert run_command(to_trt.command, to_trt.ToTrtConfig, argv=argv) == 2
    assert "--timing-cache does not fit this GPU" in capsys.readouterr().err


@pytest.mark.skipif(
    loadable_providers() == ("CPUExecutionProvider",), reason="ONNX Runtime has no CUDA provider that loads here"
)
def test_onnx_runtime_uses_the_gpu(tmp_path, make_net, make_spec, images):
    path = write_onnx(tmp_path / "plain.onnx", make_net(), make_spec())
    assert "CPU" not in OnnxSession(path).description


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_torch_runtimes_graphs_answer_as_the_dirac_net_and_leave_nothing(
    tmp_path, make_net, make_spec, images, precision
):
    net, path = make_net(), tmp_path / "plain.onnx"
    path.write_bytes(to_onnx(fold(net), make_spec(), {}, precision=precision).SerializeToString())
    held = []
    for _ in range(5):
        runtime = load_runtime(path, name="torch", device=0)
        assert runtime.description == f"PyTorch, CUDA graphs, {precision}"
        for num in (1, 5, 8, 3, 300):
            pixels = images(num) ^ np.uint8(num % 256)
            with torch.no_grad():
                expected = net(torch.from_numpy(pixels)).numpy()
            answer = runtime(pixels)
            assert compare(("Dirac net", expected), ("graph", answer), tolerance=TOLERANCES[precision])
        del runtime
        held.append(torch.cuda.memory_allocated())
    assert len({*held[1:]}) == 1  # after the first, which leaves cuBLAS its scratch memory


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_training_on_the_gpu_learns_digits(tmp_path, capsys, precision):
    argv = f"--device cuda --depth 10 --epochs 4 --precision {precision} --out {tmp_path} --json".split()
    assert run_command(train.command, train.TrainConfig, argv=argv) == 0
    assert json.loads(capsys.readouterr().out)["test_accuracy"] > 0.95
    assert run_command(train.command, train.TrainConfig, argv=[*argv, "--resume"]) == 0
