"""JSON from untrusted sources. Needs only the standard library."""

import json
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from common.refusal import Refusal

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


def _values(outer: Any) -> list[Any]:
    if isinstance(outer, dict):
        return list(outer.values())
    return outer if isinstance(outer, list) else []
