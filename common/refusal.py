"""What a user can mend: the one exception that commands print and the server answers."""


class Refusal(Exception):
    """Something the user gave cannot be used. The message is one line: what is wrong, what to do."""
