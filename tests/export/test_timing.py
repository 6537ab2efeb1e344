"""Alternating rounds, by a clock that only the timed calls advance."""

import math

import pytest

from export.timing import MIN_ROUNDS, ROUNDS, geometric_means, time_answers


class Clock:
    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def costing(self, name, seconds):
        """An answer that takes `seconds` per image."""

        def answer(images):
            self.now += seconds * len(images)
            self.order.append(name)

        return answer


@pytest.fixture
def time_two(make_spec):
    def time_two(*costs, **options):
        clock = Clock()
        answers = {name: clock.costing(name, seconds) for name, seconds in zip("ab", costs, strict=True)}
        return clock, time_answers(answers, make_spec().image, (1, 4), clock=clock, **options)

    return time_two


def test_rounds_alternate_and_the_least_geometric_mean_is_fastest(time_two):
    clock, rows = time_two(0.2, 0.1)
    warm_up = ["a", "a", "b", "b"]
    assert clock.order == (warm_up + ["a", "b"] * ROUNDS) * 2
    assert [(row.name, row.batch_size) for row in rows] == [("a", 1), ("b", 1), ("a", 4), ("b", 4)]
    assert [row.median_ms for row in rows] == pytest.approx([200, 100, 800, 400])
    assert geometric_means(rows) == pytest.approx({"b": 200, "a": 400})
    assert [*geometric_means(rows)] == ["b", "a"]


def test_a_fast_answer_is_called_often_in_a_round(time_two):
    clock, _ = time_two(0.001, 0.02)
    assert clock.order[4:25] == ["a"] * 20 + ["b"]


@pytest.mark.parametrize(("limit_s", "rounds"), [(0.0, (3, 3)), (4.0, (4, 3)), (math.inf, (9, 9))])
def test_slow_answers_get_fewer_rounds(time_two, limit_s, rounds):
    """A batch of 1 has 0.6 s of warm-up, and rounds of 0.3: with 2 s for each batch size the fifth would end at 2.1."""
    clock, _ = time_two(0.1, 0.2, limit_s=limit_s)
    assert len(clock.order) == 2 * 4 + 2 * sum(rounds)
    assert min(rounds) >= MIN_ROUNDS
