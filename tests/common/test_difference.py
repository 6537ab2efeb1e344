"""Which images keep their class, to the edge of the tolerance."""

import numpy as np

from common.difference import keeps_class

BEFORE = np.array([[1.0, 1.0 - 1.9e-4], [1.0, 1.0 - 2.1e-4]])  # the second class behind by nearly, and over, two errors
AFTER = BEFORE[:, ::-1]  # each answer names the other class


def test_classes_that_two_errors_can_exchange_tie_and_no_others():
    """Two forms may each be off by the tolerance, so a gap of twice that proves nothing."""
    assert keeps_class(BEFORE, AFTER, tolerance=1e-4).tolist() == [True, False]
    assert keeps_class(BEFORE, AFTER, tolerance=0).tolist() == [False, False]
    assert keeps_class(BEFORE, BEFORE, tolerance=0).all()
