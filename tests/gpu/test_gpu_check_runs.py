"""The table of bench/gpu_check.py on a real device, with a net that is small enough for a test."""

import pytest

from bench import gpu_check, nets
from export.runtimes import gpu
from train.progress import make_console

pytestmark = pytest.mark.skipif(not gpu.num_devices(), reason="no CUDA device: nothing can be timed on it")


@pytest.mark.slow
def test_every_runtime_but_onnx_runtimes_tensorrt_answers_and_is_within_tolerance():
    config = gpu_check.GpuCheckConfig(batch_sizes=(1, 8), rounds=2, round_s=0.01)
    rows = gpu_check._measure(nets.seeded_net(10, 0.25), config, make_console())["rows"]
    for row in rows:
        if row["title"].startswith("ONNX Runtime TensorRT"):  # only where TensorRT 10 is installed
            continue
        assert row["failed"] is None, row
        assert all(isinstance(timing, dict) for timing in row["timings"].values()), row
        assert row["parity"]["within_tolerance"] is not False, row
