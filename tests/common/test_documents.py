"""Values of a document against annotated types."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from common.documents import is_of


@dataclass
class Point:
    x: int


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -1, 2**70], [0.0, "0", True, None, []]),
        (float, [0, 0.5], ["0.5", True, None]),
        (bool, [True], [1, None]),
        (str, ["", "a"], [1, None, ["a"]]),
        (int | None, [None, 1], [False, "1"]),
        (Literal["a", "b"] | None, ["a", None], ["c", 1, ["a"]]),
        (tuple[float, ...], [[], [1, 0.5]], [3, ["1"], [True], (1, 2), {"0": 1}, None]),
        (tuple[int, int], [[1, 2]], [[1], [1, 2, 3], [1, None]]),
        (dict[str, Any], [{}, {"a": 1}], [[], None, "{}"]),
        (Point, [{}, {"x": 1}], [None, [1]]),
    ],
)
def test_a_value_is_of_a_type_or_is_not(kind, good, bad):
    assert [value for value in good if not is_of(value, kind)] == []
    assert [value for value in bad if is_of(value, kind)] == []
