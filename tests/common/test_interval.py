import pytest

from common.interval import Z_TWO, interval


def test_the_interval_solves_the_equation_of_the_score_test():
    """Its ends p are where the share that was seen is z standard errors of p away."""
    for hits, num, z in ((32, 36, 1.959964), (9507, 10_000, 1.959964), (3, 7, Z_TWO)):
        for end in interval(hits, num, z=z):
            assert abs(hits / num - end) == pytest.approx(z * (end * (1 - end) / num) ** 0.5, rel=1e-9)


def test_no_miss_in_few_images_is_no_certainty():
    low, high = interval(36, 36)
    assert (round(low, 3), high) == (0.904, pytest.approx(1.0))
    assert interval(0, 0) == (0.0, 1.0)
