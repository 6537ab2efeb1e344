"""The server without one of its shortcuts answers as with all; a page says what each brings."""

import os
import sys

import pytest

from bench.lab.server import ROOT, Server, free_port
from bench.shortcuts import ALL, _ratios
from bench.without import SHORTCUTS, WITHOUT


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_server_without_a_shortcut_still_answers(name):
    model, image = ROOT / "models" / "fashion-mnist.onnx", min((ROOT / "models" / "held-out").glob("*.png"))
    port = free_port()
    argv = [sys.executable, str(ROOT / "bench" / "without.py"), str(model), "--runtime", "onnxruntime"]
    with Server([*argv, "--port", str(port)], port, env={**os.environ, WITHOUT: name}) as server:
        assert server.predict(image.read_bytes()) == 200


def test_ratios_are_those_of_the_same_round():
    whole = [{"requests_per_s": 100.0, "p99_ms": 2.0}, {"requests_per_s": 50.0, "p99_ms": 4.0}]
    less = [{"requests_per_s": 90.0, "p99_ms": 3.0}, {"requests_per_s": 45.0, "p99_ms": 6.0}]
    assert _ratios({ALL: {"1": whole}, "x": {"1": less}}, "x") == ["0.90 (0.90–0.90)", "1.50 (1.50–1.50)"]
