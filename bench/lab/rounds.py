"""Wall-clock time of several ways to do the same, in rounds that alternate between them."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

MIN_CALLS = 3
Result = TypeVar("Result")
Name = TypeVar("Name")
Timing = Mapping[str, Any]  # what `timing_of` returns, as it is in records


class Failure(str):
    """Why a runtime gives no result, in one line."""


def timing_of(batch_size: int, round_ms: list[float]) -> dict[str, Any]:
    """The time of one call in each round, in milliseconds, their median, and images per second at the median."""
    ms = statistics.median(round_ms)
    return {"batch_size": batch_size, "median_ms": ms, "images_per_s": 1000 * batch_size / ms, "round_ms": round_ms}


def ratios(timing: Timing, *, to: Timing) -> list[float]:
    """How many times as fast as another, by round: a slow moment of the machine slows down both."""
    return [before / after for before, after in zip(to["round_ms"], timing["round_ms"], strict=True)]


def speedup(timing: Timing, *, over: Timing) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(ratios(timing, to=over))


def turns(names: Sequence[Name], num_rounds: int, *, warm_up: bool = False) -> Iterator[tuple[int, Sequence[Name]]]:
    """The rounds; every second one has the names in reverse order. Round -1 is warm-up and counts for nothing."""
    for index in range(-warm_up, num_rounds):
        yield index, names[:: -1 if index > 0 and index % 2 else 1]


def alternate(
    racers: Mapping[Name, Callable[[], float | Failure]],
    *,
    batch_size: int,
    num_rounds: int,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[Name, Any]:
    """Runs racers in `turns`, each for one round; it returns the timing of a call, in milliseconds.

    A racer that returns a `Failure` does not run again, and has it instead of a timing.
    """
    failed: dict[Name, Failure] = {}
    rounds: dict[Name, list[float]] = {name: [] for name in racers}
    for index, names in turns(list(racers), num_rounds, warm_up=True):
        for name in names:
            result = failed.get(name) or racers[name]()
            if isinstance(result, Failure):
                failed[name] = result
            elif index >= 0:
                rounds[name].append(result)
        if index >= 0:
            advance(1)
    return {name: failed.get(name) or timing_of(batch_size, times) for name, times in rounds.items()}


def attempt(action: Callable[[], Result]) -> Result | Failure:
    """The result of `action`, or the first line of its exception: a runtime that fails is a result too."""
    try:
        return action()
    except Exception as error:  # every runtime has its own exceptions
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
