"""JSON that anybody may have written. Needs only the standard library."""

import json
from typing import Any

from common.refusal import Refusal

MAX_DEPTH = 64  # of lists and objects inside each other; a dozen are ours


def read_json(content: bytes | str) -> Any:
    """What a document holds. A `ValueError`, as `json.loads` raises, also where it could not be written again.

    That is where it is nested deeper than `MAX_DEPTH`, or holds half a character ("\\ud800"), which UTF-8 cannot.
    """
    try:
        document = json.loads(content)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}") from None
    inner, depth = [document], 0
    while inner := [value for outer in inner for value in _values(outer)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a character: {error.object[error.start : error.end]!a}") from None
    return document


def read_object(content: bytes | str, what: str, *, todo: str) -> dict[str, Any]:
    """The same where it must be an object; refuses every other as damage to `what`."""
    try:
        document = read_json(content)
    except ValueError as error:
        raise Refusal(f"{what} is not valid JSON: {error}; {todo}") from error
    if not isinstance(document, dict):
        raise Refusal(f"{what} is not a JSON object; {todo}")
    return document


def _values(outer: Any) -> list[Any]:
    if isinstance(outer, dict):
        return list(outer.values())
    return outer if isinstance(outer, list) else []
