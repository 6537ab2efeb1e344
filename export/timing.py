"""Which of several forms of one net runs fastest on this machine."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.spec import ImageSpec
from export.compare import Answer

ROUNDS = 9
MIN_ROUNDS = 3
# Calls within one round: enough for the clock, and for a thread pool to wake up.
ROUND_S = 0.02


@dataclass(frozen=True)
class Timing:
    """Milliseconds for one batch: the median of alternating rounds, and the extremes."""

    name: str
    batch_size: int
    median_ms: float
    min_ms: float
    max_ms: float


def time_answers(
    answers: Mapping[str, Answer],
    image: ImageSpec,
    batch_sizes: Sequence[int],
    *,
    limit_s: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Timing]:
    """Time ways to answer the same images, in `ROUNDS` rounds that alternate between them.

    Of slow nets fewer rounds, MIN_ROUNDS at least: no round begins that is expected to end after `limit_s`.
    """
    rows = []
    for batch_size in batch_sizes:
        images = np.random.default_rng(0).integers(0, 256, (batch_size, *image.shape), dtype=np.uint8)
        start = clock()
        calls = {name: _calls_per_round(answer, images, clock) for name, answer in answers.items()}
        times: dict[str, list[float]] = {name: [] for name in answers}
        for num_rounds in range(ROUNDS):
            spent = sum(calls[name] * sum(of_it) / 1000 for name, of_it in times.items())
            if num_rounds >= MIN_ROUNDS and clock() - start + spent / num_rounds > limit_s / len(batch_sizes):
                break
            for name, answer in answers.items():
                begun = clock()
                for _ in range(calls[name]):
                    answer(images)
                times[name].append(1000 * (clock() - begun) / calls[name])
            advance(1)
        rows += [Timing(name, batch_size, statistics.median(ms), min(ms), max(ms)) for name, ms in times.items()]
    return rows


def geometric_means(rows: Sequence[Timing]) -> dict[str, float]:
    """Milliseconds of each name over all its batch sizes, the least first."""
    names = dict.fromkeys(row.name for row in rows)
    means = {name: statistics.geometric_mean(row.median_ms for row in rows if row.name == name) for name in names}
    return dict(sorted(means.items(), key=lambda pair: pair[1]))


def _calls_per_round(answer: Answer, images: np.ndarray, clock: Callable[[], float]) -> int:
    answer(images)
    start = clock()
    answer(images)
    return max(1, round(ROUND_S / (clock() - start)))
