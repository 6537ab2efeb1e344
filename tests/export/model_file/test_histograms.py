"""Counts of answers, and what chance makes of two counts of one distribution."""

import numpy as np
import pytest

from export.model_file.reference import EDGES, NUM_BINS, PARTS, bin_of, count, drift, part
from export.runtimes.runtime import best


def test_every_image_is_counted_once_in_each_part():
    rng = np.random.default_rng(0)
    values = rng.dirichlet(np.full(7, 0.3), 400)
    order = best(values, 2)
    counts = count(order, np.take_along_axis(values, order, axis=1), 7)
    top, second = np.sort(values)[:, -1], np.sort(values)[:, -2]
    assert part(counts, "classes").tolist() == [(values.argmax(1) == index).sum() for index in range(7)]
    lows = (-np.inf, *EDGES[:-1])
    for name, found in (("top_probability", top), ("margin", top - second)):
        expected = [((low < found) & (found <= high)).sum() for low, high in zip(lows, EDGES, strict=True)]
        assert part(counts, name).tolist() == expected
    assert {part(counts, name).sum() for name in PARTS} == {400}


def test_bins_hold_their_upper_end_and_the_last_one_what_is_above():
    assert [bin_of(edge) for edge in EDGES] == list(range(NUM_BINS))
    assert bin_of(0.0) == bin_of(-1e-9) == 0
    assert bin_of(1.0000001) == NUM_BINS - 1


def test_drift_is_the_share_that_is_counted_elsewhere():
    found = drift(np.array([5, 5, 0]), np.array([50, 0, 50]))
    assert found.value == 0.5
    assert found.num_images == 10
    assert drift(np.array([3, 1]), np.array([30, 10])).value == 0
    assert drift(np.array([4, 0]), np.array([0, 9])).value == 1
    alone = drift(np.array([4, 0]), np.array([9, 0]))  # one class: chance has nothing to move
    assert (alone.value, alone.chance) == (0, 0)


@pytest.mark.parametrize(("first", "second"), [((50, 50), (200, 200)), ((9, 1), (270, 30))])
def test_chance_in_two_classes_is_two_deviations_above_the_mean_of_a_half_normal_value(first, second):
    (share, _), scale = np.array(first) / sum(first), 1 / sum(first) + 1 / sum(second)
    deviation = np.sqrt(share * (1 - share) * scale)
    expected = deviation * (np.sqrt(2 / np.pi) + 2 * np.sqrt(1 - 2 / np.pi))
    assert drift(np.array(first), np.array(second)).chance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("shares", "n", "m"),
    [
        ([0.5, 0.5], 100, 400),
        ([0.9, 0.1], 300, 300),
        ([0.1] * 10, 500, 2000),
        ([0.6, 0.3, 0.05, 0.03, 0.02], 5000, 359),
        (np.arange(1, 301) / np.arange(1, 301).sum(), 3000, 10_000),
    ],
)
def test_chance_alone_stays_below_what_is_said_in_95_of_100_cases_and_a_drift_does_not(shares, n, m):
    """Within three standard deviations of 2,000 draws, 1.5 %. A shift three times as far as chance goes is seen."""
    rng = np.random.default_rng(0)
    pairs = zip(rng.multinomial(n, shares, 2000), rng.multinomial(m, shares, 2000), strict=True)
    found = [drift(first, second) for first, second in pairs]
    assert np.mean([pair.value > pair.chance for pair in found]) < 0.05 + 0.015
    share = 3 * np.mean([pair.chance for pair in found]) / (1 - shares[-1])  # what is moved to the last class
    moved = np.array(shares) * (1 - share)
    moved[-1] += share
    drifted = [drift(first, rng.multinomial(m, shares)) for first in rng.multinomial(n, moved, 200)]
    assert np.mean([pair.value > pair.chance for pair in drifted]) > 0.9
