import numpy as np
import pytest

from export.runtimes.cascade import Evidence
from export.verification import recomputed


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ({}, []),
        ({"num_changed": 5}, []),  # within 3 of 1,000, as the drop in accuracy may be
        ({"num_changed": 6}, ["changed"]),
        ({"changed_at_most": 0.0019}, ["changed"]),  # near the record, and more than it promises
        ({"num_test": 999}, ["escalated", "changed", "changed alone"]),
    ],
)
def test_a_cascade_that_changes_more_classes_than_it_promises_differs(changes, differ):
    exact = np.tile([1.0, 0.0], (1000, 1))
    quick = exact.copy()
    quick[:2] = [0.0, 1.0]
    fields = {"threshold": 0.5, "num_chosen_by": 10, "num_test": 1000, "num_escalated": 0}
    fields |= {"num_changed": 2, "num_changed_alone": 2, "changed_at_most": 0.007, **changes}
    rows = recomputed._cascade(Evidence(**fields), (exact, quick), "")
    assert [row.claim for row in rows if row.verdict == "differs"] == [f"cascade: {name}" for name in differ]
