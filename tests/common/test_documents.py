"""Values of a document against annotated types."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from common.documents import is_of, wrong_fields


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


def test_a_wrong_field_is_named_with_what_is_expected():
    kinds = {"size": tuple[int, int], "order": Literal["rgb", "bgr"] | None, "proof": Point, "name": str, "all": bool}
    assert wrong_fields({"size": [1, 2], "order": None, "proof": {}, "name": "", "all": True}, kinds) == []
    assert wrong_fields({"size": 3, "order": "b", "proof": [], "name": 1, "all": 0}, kinds) == [
        "size cannot be 3 (expected: a list of 2 whole numbers)",
        """order cannot be 'b' (expected: "rgb" or "bgr" or null)""",
        "proof cannot be [] (expected: an object)",
        "name cannot be 1 (expected: a string)",
        "all cannot be 0 (expected: true or false)",
    ]
