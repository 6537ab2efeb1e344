"""Which of several ONNX graphs ONNX Runtime runs fastest on this machine."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.runtimes.offline import ort
from train.spec import ImageSpec

ROUNDS = 9
# Calls within one round: enough for the clock, and for a thread pool to wake up.
ROUND_S = 0.02


@dataclass(frozen=True)
class Timing:
    """Milliseconds for one batch: the median of `ROUNDS` alternating rounds, and the extremes."""

    name: str
    batch_size: int
    median_ms: float
    min_ms: float
    max_ms: float


def time_models(
    models: Mapping[str, bytes],
    image: ImageSpec,
    batch_sizes: Sequence[int],
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    advance: Callable[[int], None] = lambda n: None,
) -> list[Timing]:
    """Time serialised graphs of one net, in rounds that alternate between them."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    sessions = {name: ort.InferenceSession(model, options, providers=list(providers)) for name, model in models.items()}
    rows = []
    for batch_size in batch_sizes:
        images = np.random.default_rng(0).integers(
            0, 256, (batch_size, image.height, image.width, image.channels), dtype=np.uint8
        )
        times: dict[str, list[float]] = {name: [] for name in sessions}
        calls = {name: _calls_per_round(session, images) for name, session in sessions.items()}
        for _ in range(ROUNDS):
            for name, session in sessions.items():
                start = time.perf_counter()
                for _ in range(calls[name]):
                    session.run(None, {"images": images})
                times[name].append(1000 * (time.perf_counter() - start) / calls[name])
            advance(1)
        rows += [
            Timing(name, batch_size, statistics.median(of_name), min(of_name), max(of_name))
            for name, of_name in times.items()
        ]
    return rows


def fastest(rows: Sequence[Timing]) -> str:
    """The name with the least time over all batch sizes, as a geometric mean."""
    logs: dict[str, float] = {}
    for row in rows:
        logs[row.name] = logs.get(row.name, 0.0) + math.log(row.median_ms)
    return min(logs, key=lambda name: logs[name])


def _calls_per_round(session: ort.InferenceSession, images: np.ndarray) -> int:
    session.run(None, {"images": images})
    start = time.perf_counter()
    session.run(None, {"images": images})
    return max(1, round(ROUND_S / (time.perf_counter() - start)))
