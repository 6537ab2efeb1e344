"""Wall-clock time of several ways to do the same, in rounds that alternate between them."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from common.refusal import Refusal

MIN_CALLS = 3
Result = TypeVar("Result")
Name = TypeVar("Name")


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

    def ratios_to(self, other: "Timing") -> list[float]:
        """How many times as fast as `other`, by round: a slow moment of the machine slows down both."""
        return [before / after for before, after in zip(other.round_ms, self.round_ms, strict=True)]

    def speedup_over(self, other: "Timing") -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios_to(other))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Timing":
        return cls(record["batch_size"], tuple(record["round_ms"]))

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


def turns(names: Sequence[Name], num_rounds: int, *, warm_up: bool = False) -> Iterator[tuple[int, Sequence[Name]]]:
    """The rounds; every second one has the names in reverse order. Round -1 is warm-up and counts for nothing."""
    for index in range(-warm_up, num_rounds):
        yield index, names[:: -1 if index > 0 and index % 2 else 1]


def alternate(
    racers: Mapping[Name, Callable[[], float]],
    *,
    batch_size: int,
    num_rounds: int,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[Name, Timing | Failure]:
    """Runs racers in `turns`, each for one round; it gives the milliseconds of a call.

    A racer that fails is left out from then on.
    """
    failed: dict[Name, Failure] = {}
    rounds: dict[Name, list[float]] = {name: [] for name in racers}
    for index, names in turns(list(racers), num_rounds, warm_up=True):
        for name in names:
            result = failed.get(name) or attempt(racers[name])
            if isinstance(result, Failure):
                failed[name] = result
            elif index >= 0:
                rounds[name].append(result)
        if index >= 0:
            advance(1)
    return {name: failed.get(name) or Timing(batch_size, tuple(times)) for name, times in rounds.items()}


def alternate_all(racers: Mapping[Name, Callable[[], float]], **options: Any) -> dict[Name, Timing]:
    """`alternate` where no racer may fail: refuses with the reasons of those that do."""
    results = alternate(racers, **options)
    if failed := [f"{name}: {found.reason}" for name, found in results.items() if isinstance(found, Failure)]:
        raise Refusal(f"cannot be timed: {'; '.join(failed)}")
    return {name: found for name, found in results.items() if isinstance(found, Timing)}


def attempt(action: Callable[[], Result]) -> Result | Failure:
    """The result of `action`, or the first line of its exception: a runtime that fails is a result too."""
    try:
        return action()
    except Exception as error:  # every runtime raises kinds of its own
        lines = str(error).strip().splitlines() or [""]
        return Failure(f"{type(error).__name__}: {lines[0]}"[:200])


def median_ms(
    action: Callable[[], object],
    seconds: float,
    *,
    min_calls: int = MIN_CALLS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The median of calls over `seconds`, `min_calls` at least, by `clock`.

    A call of a runtime ends with its logits in the host's memory, so the clock waits for the device.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < min_calls or time.perf_counter() < end:
        start = clock()
        action()
        times.append(1000 * (clock() - start))
    return statistics.median(times)
