import numpy as np

from bench.rounds import MIN_CALLS, Failure, Timing, attempt, time_rounds

IMAGES = np.zeros((4, 2, 2, 1), np.uint8)


def test_every_second_round_runs_in_reverse_order():
    calls = []
    answers = {name: lambda images, name=name: calls.append((name, len(images))) for name in "abc"}
    results = time_rounds(answers, IMAGES, num_rounds=3, round_s=1e-9)
    order = [name for name, _ in calls[::MIN_CALLS]]
    assert "".join(order) == "abcabccbaabc"  # warm-up, then three rounds
    assert {num for _, num in calls} == {4}
    assert {len(timing.round_ms) for timing in results.values()} == {3}


def test_a_runtime_that_fails_is_a_result_and_the_others_go_on():
    def fail(images):
        raise MemoryError("no room\nfor more")

    results = time_rounds({"a": fail, "b": lambda images: images}, IMAGES, num_rounds=2, round_s=1e-9)
    assert results["a"] == Failure("MemoryError: no room")
    assert len(results["b"].round_ms) == 2
    assert attempt(lambda: 5) == 5


def test_a_speedup_is_the_median_of_the_rounds_ratios():
    slow, fast = Timing(8, (10.0, 40.0, 12.0)), Timing(8, (5.0, 10.0, 6.0))
    assert fast.speedup_over(slow) == 2
    assert (slow.median_ms, fast.images_per_s) == (12, 8 / 0.006)
    assert fast.to_dict() == {"batch_size": 8, "median_ms": 6, "images_per_s": 8 / 0.006, "round_ms": [5, 10, 6]}
