"""The one exception for errors that a user can fix: commands print it, the server answers with it."""


class Refusal(Exception):
    """Something the user gave cannot be used. The message is one line: what is wrong, what to do."""


def one_line(error: BaseException, length: int = 200) -> str:
    """The message of an error in one line of at most `length` characters, for a refusal to quote."""
    return " ".join(str(error).split())[:length] or type(error).__name__
