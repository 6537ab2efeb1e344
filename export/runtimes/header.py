"""What an ONNX file says of itself, read without any library: the graph is skipped over."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.documents import read_object
from train.refusal import Refusal
from train.spec import Spec

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
        """What training, fold and export recorded; empty in somebody else's file."""
        if "spec" not in self.metadata:
            return {}
        what = "the provenance in the model's file"
        record = read_object(self.metadata.get("provenance", "{}"), what, todo="export it again")
        if bad := [name for name in _SECTIONS if not isinstance(record.get(name, {}), dict)]:
            raise Refusal(f"{what} is damaged: {bad[0]} is not a JSON object; export it again")
        return record


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
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:  # the wire types of Protocol Buffers
            case 0:
                value, at = _varint(message, at)
                yield tag >> 3, value
            case 1:
                at += 8
            case 5:
                at += 4
            case 2:
                size, at = _varint(message, at)
                at += size
                if at <= len(message):
                    yield tag >> 3, message[at - size : at]
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
