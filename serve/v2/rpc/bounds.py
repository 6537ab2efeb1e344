"""What a message of Protocol Buffers would become in memory, before it is read.

Two bytes can stand for an object of a hundred: 5 MB of empty tensors take 223 MB. So long messages are walked field by
field first, and one of more fields than a request has any use for is refused.
"""

from functools import lru_cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from serve.request.problems import TOO_LARGE, Problem

SHORT_BYTES = 2**16  # so few become 3 MB at most
MAX_FIELDS = 4096  # of a message and of all that it holds; one of 64 files has 80
MAX_NUMBER_BYTES = 2**21  # of repeated numbers, which take four to eight times as much once read
_LENGTH = 2  # the kind of field that says how long it is: text, bytes, a message, or numbers one after another
_TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def check_size(message: bytes, kind: Descriptor) -> None:
    """Refuses a message that would become far larger than it is. Raises ValueError where it is no message at all."""
    if len(message) > SHORT_BYTES:
        walk(message, kind)


def walk(message: bytes, kind: Descriptor) -> None:
    """The same for a message of any length."""
    num_fields = num_number_bytes = 0
    spans = [(0, len(message), kind)]
    while spans:
        at, end, kind = spans.pop()
        while at < end:
            number, wire, start, at = _next_field(message, at, end)
            num_fields += 1
            inner = _children(kind).get(number) if wire == _LENGTH else None
            if isinstance(inner, Descriptor):
                spans.append((start, at, inner))
            elif inner:
                num_number_bytes += at - start
            if num_fields > MAX_FIELDS:
                raise Problem(TOO_LARGE, f"the message has more than {MAX_FIELDS:,} fields; send less at once")
            if num_number_bytes > MAX_NUMBER_BYTES:
                detail = f"the message has more than {MAX_NUMBER_BYTES:,} bytes of single numbers"
                raise Problem(TOO_LARGE, f"{detail}; send pixels in raw_input_contents")


@lru_cache
def _children(kind: Descriptor) -> dict[int, Descriptor | bool]:
    """By number: what is a message of its own, and True for numbers."""
    return {field.number: field.message_type or True for field in kind.fields if field.type not in _TEXTS}


def _next_field(message: bytes, at: int, end: int) -> tuple[int, int, int, int]:
    """Number and kind of the field at `at`, and where its content starts and ends."""
    tag, start = _read_varint(message, at)
    if tag < 8:
        raise ValueError("a field has the number 0")
    match tag & 7:
        case 0:
            after = _read_varint(message, start)[1]
        case 1:
            after = start + 8
        case 2:
            size, start = _read_varint(message, start)
            after = start + size
        case 5:
            after = start + 4
        case wire:
            raise ValueError(f"a field of kind {wire}")
    if after > end:
        raise ValueError(f"a field ends at byte {after} of {end}")
    return tag >> 3, tag & 7, start, after


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits in each byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at + shift // 7] if at + shift // 7 < len(message) else 0x80
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + shift // 7 + 1
    raise ValueError(f"no number at byte {at}")
