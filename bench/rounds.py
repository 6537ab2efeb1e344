"""Wall-clock time of several ways to do the same, in rounds that alternate between them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from export.compare import Answer

MIN_CALLS = 3
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """The time of one call in each round, in milliseconds; a round's is the median of its calls."""

    batch_size: int
    round_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.round_ms)

    @property
    def images_per_s(self) -> float:
        return 1000 * self.batch_size / self.median_ms

    def speedup_over(self, other: "Timing") -> float:
        """The median of the rounds' ratios: what slows down the machine for a while slows down both."""
        return statistics.median(before / after for before, after in zip(other.round_ms, self.round_ms, strict=True))

    def to_dict(self) -> dict[str, float | list[float]]:
        return {
            "batch_size": self.batch_size,
            "median_ms": self.median_ms,
            "images_per_s": self.images_per_s,
            "round_ms": list(self.round_ms),
        }


@dataclass(frozen=True)
class Failure:
    """Why a runtime gives no result, in one line."""

    reason: str


def time_rounds(
    answers: Mapping[str, Answer],
    images: np.ndarray,
    *,
    num_rounds: int,
    round_s: float,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Timing | Failure]:
    """For each name its timing on the batch `images`, or why it failed.

    A call ends with its logits in the host's memory, so the clock waits for the device. Warm-up lasts
    as long as a round. Every second round runs in reverse order.
    """
    results: dict[str, Timing | Failure] = {}
    actions = {name: partial(answer, images) for name, answer in answers.items()}
    for name in answers:
        warm_up = attempt(partial(_median_ms, actions[name], round_s))
        if isinstance(warm_up, Failure):
            results[name] = warm_up
            del actions[name]
    rounds = alternate(actions, num_rounds=num_rounds, round_s=round_s, advance=advance)
    return results | {name: Timing(len(images), times) for name, times in rounds.items()}


def alternate(
    actions: Mapping[str, Callable[[], object]],
    *,
    num_rounds: int,
    round_s: float,
    min_calls: int = MIN_CALLS,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, tuple[float, ...]]:
    """For each name the milliseconds of one call in each round: the median of `min_calls` and of all in `round_s`.

    Every second round runs in reverse order.
    """
    rounds: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(num_rounds):
        for name in list(actions)[:: 1 if index % 2 == 0 else -1]:
            rounds[name].append(_median_ms(actions[name], round_s, min_calls))
        advance(1)
    return {name: tuple(times) for name, times in rounds.items()}


def attempt(action: Callable[[], Result]) -> Result | Failure:
    """What `action` gives, or the first line of its exception: a runtime that fails is a result too."""
    try:
        return action()
    except Exception as error:  # every runtime raises kinds of its own
        lines = str(error).strip().splitlines() or [""]
        return Failure(f"{type(error).__name__}: {lines[0]}"[:200])


def _median_ms(action: Callable[[], object], seconds: float, min_calls: int = MIN_CALLS) -> float:
    """The median of calls over `seconds`, `min_calls` at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < min_calls or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
