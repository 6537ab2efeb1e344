"""ONNX Runtime's kernels for AVX2 alone, on a processor that has more, against those that it would choose here."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
ANSWER = """
import sys
from pathlib import Path

import numpy as np

from export.runtimes.onnx_session import OnnxSession
from export.runtimes.saturation import saturates

model, images, logits = map(Path, sys.argv[1:])
np.save(logits, OnnxSession(model, num_threads=1)(np.load(images)))
print("saturates", saturates())
"""
needs_gdb = pytest.mark.skipif(
    platform.machine() != "x86_64" or not all(map(shutil.which, ("gdb", "objdump"))), reason="needs gdb on x86-64"
)


@pytest.mark.slow
@needs_gdb
def test_the_int8_form_answers_with_every_kernel_bit_for_bit_the_same(tmp_path):
    model, images = ROOT / "models" / "fashion-mnist-int8.onnx", tmp_path / "images.npy"
    np.save(images, np.random.default_rng(0).integers(0, 256, (64, 28, 28, 1), dtype=np.uint8))
    alone = ["gdb", "-batch", "-x", str(ROOT / "bench" / "lab" / "avx2_only.py"), "--args"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    logits, printed = [], []
    for name, before in (("here", []), ("avx2", alone)):
        argv = [*before, sys.executable, "-c", ANSWER, str(model), str(images), str(tmp_path / f"{name}.npy")]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=environment)
        logits.append(np.load(tmp_path / f"{name}.npy"))
        printed.append(done.stdout)
    assert "saturates True" in printed[1]  # the kernels were those of AVX2
    np.testing.assert_array_equal(*logits)
