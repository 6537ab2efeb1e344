"""The one exception for errors that a user can fix: commands print it, the server answers with it."""

from collections.abc import Sequence


class Refusal(Exception):
    """Something the user gave cannot be used. The message is one line: what is wrong, what to do."""


def one_line(error: BaseException, length: int = 200) -> str:
    """The message of an error in one line of at most `length` characters, for a refusal to quote."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def first_of(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are, for a refusal to list."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
