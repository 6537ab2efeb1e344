"""JSON and Protocol Buffers from untrusted sources. Needs only the standard library."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from common.refusal import Refusal

_VARINT = re.compile(rb"[\x80-\xff]{0,9}[\0-\x7f]")
_FIXED_BYTES = {1: 8, 5: 4}  # by the wire type
_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", NoneType: "null"}
MAX_DEPTH = 64  # of lists and objects inside each other; this project's own documents have a dozen


def read_json(content: bytes | str) -> Any:
    """Parse a document; raises `ValueError`, as `json.loads` does, also if it could not be written again.

    That is the case if it is nested deeper than `MAX_DEPTH`, or holds half a character ("\\ud800"), which UTF-8 cannot
    encode.
    """
    too_deep = ValueError(f"it is nested deeper than {MAX_DEPTH}")
    try:
        document = json.loads(content)
    except RecursionError:
        raise too_deep from None
    level, depth = [document], 0
    while level := [value for outer in level for value in _values(outer)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise too_deep
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a character: {error.object[error.start : error.end]!a}") from None
    return document


def read_object(content: bytes | str, what: str, *, todo: str) -> dict[str, Any]:
    """The same for a document that must be an object; refuses any other, naming it `what` and the remedy `todo`."""
    try:
        document = read_json(content)
    except ValueError as error:
        raise Refusal(f"{what} is not valid JSON: {error}; {todo}") from error
    if not isinstance(document, dict):
        raise Refusal(f"{what} is not a JSON object; {todo}")
    return document


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value of a document is of an annotated type: `int | None`, `tuple[float, ...]`, `Literal["a", "b"]`.

    A list stands for a tuple, an object for a dataclass, and a whole number may be a float's.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(is_of(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... and isinstance(value, list) else arguments
        return isinstance(value, list) and len(value) == len(kinds) and all(map(is_of, value, kinds))
    if is_dataclass(origin):
        return isinstance(value, dict)
    return isinstance(value, int | float if origin is float else origin) and (origin is bool or type(value) is not bool)


def wrong_fields(record: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """The fields that are not of their annotated types: "mean cannot be 3 (expected: a list of numbers)"."""
    return [
        f"{name} cannot be {repr(_culprit(value, kinds[name]))[:80]} (expected: {_in_words(kinds[name])})"
        for name, value in record.items()
        if not is_of(value, kinds[name])
    ]


def _culprit(value: Any, kind: Any) -> Any:
    """The first wrong entry of a list of any length, or else the value."""
    if not (isinstance(value, list) and get_origin(kind) is tuple and ... in get_args(kind)):
        return value
    return next(entry for entry in value if not is_of(entry, get_args(kind)[0]))


def read_fields(message: bytes | memoryview) -> Iterator[tuple[int, memoryview | int | None, slice]]:
    """(number, content, place) of each field of a message of Protocol Buffers; raises ValueError if it is not one.

    The content is an integer, or bytes, which may be another message; None for a number of fixed size, such as a float.
    """
    at = 0
    while at < len(message):
        start = at
        tag, at = read_varint(message, at)
        content: memoryview | int | None = None
        match tag & 7:
            case 0:
                content, at = read_varint(message, at)
            case 2:
                size, at = read_varint(message, at)
                content, at = memoryview(message)[at : at + size], at + size
            case kind if kind in _FIXED_BYTES:
                at += _FIXED_BYTES[kind]
            case kind:
                raise ValueError(f"a field of kind {kind}")
        if tag < 8:
            raise ValueError("a field has the number 0")
        if at > len(message):
            raise ValueError(f"a field ends at byte {at} of {len(message)}")
        yield tag >> 3, content, slice(start, at)


def read_varint(message: bytes | memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits in each byte, the lowest first, and where it ends."""
    found = _VARINT.match(message, at)
    if not found:
        raise ValueError(f"no number at byte {at}")
    return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(found[0])), found.end()


def _in_words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, arguments))
    if origin is Literal:
        return " or ".join(map(json.dumps, arguments))
    if origin is tuple:
        num = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"a list of {num}{_in_words(arguments[0]).removeprefix('a ')}s"
    return _IN_WORDS.get(kind, "an object")


def _values(outer: Any) -> list[Any]:
    if isinstance(outer, dict):
        return list(outer.values())
    return outer if isinstance(outer, list) else []
