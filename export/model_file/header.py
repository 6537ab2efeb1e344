"""What an ONNX file says of itself, read without any library: the graph is skipped over."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.documents import read_json, read_object
from common.refusal import Refusal
from common.spec import Spec
from export.model_file.reference import KEY

# Field numbers of onnx.proto.
_MODEL_OPSETS, _MODEL_METADATA = 8, 14
_SECTIONS = ("training", "fold", "export")  # of the provenance
_FIRST, _SECOND = 1, 2  # a metadata entry's key and value; the domain of a set of operators


@dataclass(frozen=True)
class Header:
    metadata: dict[str, str]  # "spec" and "provenance", as JSON, in a file of ours
    domains: tuple[str, ...]  # of its operators; "" is ONNX's own

    @property
    def spec(self) -> Spec | None:
        """None in somebody else's file."""
        return Spec.from_json(self.metadata["spec"]) if "spec" in self.metadata else None

    @property
    def provenance(self) -> dict[str, Any]:
        """What training, fold and export recorded, and the reference, whatever it is; else empty in others' files."""
        return {**self._recorded, **({KEY: _as_json(self.metadata[KEY])} if KEY in self.metadata else {})}

    @property
    def _recorded(self) -> dict[str, Any]:
        if "spec" not in self.metadata:
            return {}
        what = "the provenance in the model's file"
        record = read_object(self.metadata.get("provenance", "{}"), what, todo="export it again")
        if bad := [name for name in _SECTIONS if not isinstance(record.get(name, {}), dict)]:
            raise Refusal(f"{what} is damaged: {bad[0]} is not a JSON object; export it again")
        return record


def _as_json(text: str) -> Any:
    """What `text` says, or itself: whoever uses it looks whether it is what it should be."""
    try:
        return read_json(text)
    except ValueError:
        return text


def read_header(path: Path, content: bytes) -> Header:
    """The header of an ONNX file; `path` is for the refusal of what is none."""
    metadata, domains = {}, []
    try:
        for number, message in contents(memoryview(content)):
            if number == _MODEL_METADATA:
                entry = dict(contents(message))
                metadata[str(entry[_FIRST], "utf-8")] = str(entry.get(_SECOND, b""), "utf-8")
            elif number == _MODEL_OPSETS:
                domains.append(str(dict(contents(message)).get(_FIRST, b""), "utf-8"))
    except (ValueError, IndexError, KeyError) as error:
        raise Refusal(f"{path} cannot be loaded as an ONNX model: its encoding is damaged; export it again") from error
    return Header(metadata, tuple(domains))


def contents(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of each field that holds bytes; numbers are skipped over."""
    return ((number, value) for number, value in every_field(message) if isinstance(value, memoryview))


def every_field(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(number, content) of each field that holds bytes or a whole number; floats are skipped over."""
    return ((number, value) for number, value, _ in _walk(message))


def metadata_places(content: bytes, key: str) -> list[slice]:
    """Where the entries of the metadata with that key stand in an ONNX file that `read_header` takes."""
    return [
        place
        for number, value, place in _walk(memoryview(content))
        if number == _MODEL_METADATA
        and isinstance(value, memoryview)
        and bytes(dict(contents(value))[_FIRST]) == key.encode()
    ]


def metadata_entry(key: str, value: str) -> bytes:
    """One more entry, for the end of an ONNX file: the order of the fields means nothing."""
    return _field(_MODEL_METADATA, _field(_FIRST, key.encode()) + _field(_SECOND, value.encode()))


def _field(number: int, content: bytes) -> bytes:
    return _to_varint(number << 3 | 2) + _to_varint(len(content)) + content


def _walk(message: memoryview) -> Iterator[tuple[int, memoryview | int, slice]]:
    """As `every_field`, with the place of all of the field."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        match tag & 7:  # the wire types of Protocol Buffers
            case 0:
                value, at = _varint(message, at)
                yield tag >> 3, value, slice(start, at)
            case 1:
                at += 8
            case 5:
                at += 4
            case 2:
                size, at = _varint(message, at)
                at += size
                if at <= len(message):
                    yield tag >> 3, message[at - size : at], slice(start, at)
            case kind:
                raise ValueError(f"wire type {kind}")
    if at > len(message):
        raise ValueError("cut off")


def unpack(message: memoryview) -> list[int]:
    """The whole numbers of a packed field."""
    numbers, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        numbers.append(value)
    return numbers


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where the next field starts."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at


def _to_varint(value: int) -> bytes:
    """The inverse."""
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])
