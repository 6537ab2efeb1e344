"""The table of bench/gpu_check.py on a real device, with a net that is small enough for a test."""

import importlib.util

import pytest

from bench import gpu_check, nets
from bench.runtimes import contenders
from common.progress import make_console
from export.runtimes import gpu
from export.runtimes.onnx_session import loadable_providers

pytestmark = pytest.mark.skipif(not gpu.num_devices(), reason="no CUDA device: nothing can be timed on it")


def can_run(title):
    """Whether what the row needs is installed; ONNX Runtime's TensorRT provider needs TensorRT 10, which may be not."""
    if title.startswith("ONNX Runtime"):
        return "TensorRT" not in title and "CUDAExecutionProvider" in loadable_providers()
    return "TensorRT" not in title or importlib.util.find_spec("tensorrt") is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # PyTorch's own, compiling
def test_every_runtime_but_onnx_runtimes_tensorrt_answers_and_is_within_tolerance():
    config = gpu_check.GpuCheckConfig(batch_sizes=(1, 8), rounds=2, round_s=0.01)
    rows = contenders.measure(nets.seeded_net(10, 0.25), config, make_console())["rows"]
    for row in rows:
        if not can_run(row["title"]):
            continue
        assert row["failed"] is None, row
        assert all(isinstance(timing, dict) for timing in row["timings"].values()), row
        assert row["parity"]["within_tolerance"] is not False, row
