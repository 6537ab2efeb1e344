import time
from functools import partial

import pytest

from bench.lab.rounds import MIN_CALLS, alternate, attempt, median_ms, speedup, timing_of


def test_every_second_round_runs_in_reverse_order():
    calls = []
    racers = {name: partial(median_ms, partial(calls.append, name), 1e-9) for name in "abc"}
    results = alternate(racers, batch_size=4, num_rounds=3)
    assert "".join(calls[::MIN_CALLS]) == "abcabccbaabc"  # warm-up, then three rounds
    assert {timing["batch_size"] for timing in results.values()} == {4}
    assert {len(timing["round_ms"]) for timing in results.values()} == {3}


def test_a_runtime_that_fails_is_a_result_and_the_others_go_on():
    def fail():
        raise MemoryError("no room\nfor more")

    racers = {"a": partial(attempt, fail), "b": lambda: 1.0}
    results = alternate(racers, batch_size=4, num_rounds=2)
    assert results["a"] == "MemoryError: no room"
    assert len(results["b"]["round_ms"]) == 2
    assert attempt(lambda: 5) == 5
    with pytest.raises(MemoryError):
        alternate({"a": fail}, batch_size=4, num_rounds=2)


def test_time_may_be_that_of_the_processor():
    assert median_ms(lambda: sum(range(20_000)), 0.001, clock=time.process_time) > 0
    assert median_ms(lambda: None, 0.001, clock=iter(range(10**9)).__next__) == 1000


def test_a_speedup_is_the_median_of_the_rounds_ratios():
    slow, fast = timing_of(8, [10.0, 40.0, 12.0]), timing_of(8, [5.0, 10.0, 6.0])
    assert speedup(fast, over=slow) == 2
    assert slow["median_ms"] == 12
    assert fast == {"batch_size": 8, "median_ms": 6, "images_per_s": 8 / 0.006, "round_ms": [5, 10, 6]}
