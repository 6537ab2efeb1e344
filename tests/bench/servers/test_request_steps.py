"""The parts of a request are those of the server that serves."""

from pathlib import Path

import pytest

from bench.servers import request_steps

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_every_part_is_timed_on_the_real_server_and_takes_time(monkeypatch):
    monkeypatch.setattr(request_steps, "NUM_ROUNDS", 3)
    png = next((ROOT / "models" / "held-out").glob("*.png")).read_bytes()
    steps = request_steps.time_steps(ROOT / "models" / "fashion-mnist.onnx", png)
    assert list(steps) == [
        "model, in batches of 32",
        "decoding",
        "HTTP: uvicorn's protocol and one task",
        "body, limits, headers, ids",
        "metrics and log",
        "queue, batch, results, JSON",
    ]
    assert steps["model, in batches of 32"] > 0
    assert steps["decoding"] > 0
    assert steps["HTTP: uvicorn's protocol and one task"] > 0
