"""Values of a document against annotated types, and the fields of a message of Protocol Buffers."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from common.documents import is_of, read_fields, wrong_fields


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


def test_the_fields_of_a_message_are_read_with_their_places():
    """150 in field 1 is the first example of the format's own documentation."""
    message = b"\x08\x96\x01" + b"\x12\x03abc" + b"\x0d1234" + b"\x1912345678"
    fields = [
        (number, bytes(c) if isinstance(c, memoryview) else c, place) for number, c, place in read_fields(message)
    ]
    assert fields == [
        (1, 150, slice(0, 3)),
        (2, b"abc", slice(3, 8)),
        (1, None, slice(8, 13)),
        (3, None, slice(13, 22)),
    ]
    assert not list(read_fields(b""))


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (b"\x00\x00", "a field has the number 0"),
        (b"\x07", "a field of kind 7"),
        (b"\x0b", "a field of kind 3"),
        (b"\x12\x04abc", "a field ends at byte 6 of 5"),
        (b"\x0d123", "a field ends at byte 5 of 4"),
        (b"\x08\x80", "no number at byte 1"),
        (b"\x08" + b"\x80" * 10 + b"\x00", "no number at byte 1"),
    ],
)
def test_a_damaged_message_is_refused(message, problem):
    with pytest.raises(ValueError, match=f"^{problem}$"):
        list(read_fields(message))
