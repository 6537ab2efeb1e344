"""The one exception for errors that a user can fix: commands print it, the server answers with it."""


class Refusal(Exception):
    """Something the user gave cannot be used. The message is one line: what is wrong, what to do."""
