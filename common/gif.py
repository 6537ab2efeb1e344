"""The first frame of a GIF, without what lies before it."""

from common.refusal import Refusal

MAX_BLOCKS = 10_000  # of comments and the like before the first frame; 2.5 MB of them
_SCREEN_BYTES = 13  # signature, size of the screen, what its colour table is like
_EXTENSION, _CONTROL = 0x21, 0xF9


def first_frame(content: bytes) -> bytes:
    """A GIF without the comments and profiles before its first frame; refuses a file with too many of them.

    Pillow reads all of that, which takes 5 s where it is 20 MB of comments of one letter, and no other thread runs
    meanwhile. An `IndexError` where the file ends too early.
    """
    has_table, size = content[10] & 0x80, content[10] & 7
    end = at = _SCREEN_BYTES + (3 << (size + 1) if has_table else 0)
    control, num_blocks = b"", 0
    while content[at] == _EXTENSION:
        start = at
        at += 2
        while content[at]:
            at += content[at] + 1
            num_blocks += 1
        at += 1
        num_blocks += 1
        if num_blocks > MAX_BLOCKS:
            raise Refusal(f"the GIF has over {MAX_BLOCKS:,} blocks before its first frame; send it as PNG")
        if content[start + 1] == _CONTROL:  # says which colour is transparent
            control = content[start:at]
    return content[:end] + control + content[at:]
