"""Tensors of the Open Inference Protocol, in JSON or as bytes behind it: images in, logits out.

A body is a JSON header followed by the bytes of tensors that are not in the header itself. The HTTP header
`Inference-Header-Content-Length` says where the JSON ends; without it the whole body is JSON.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import orjson

from serve.request.body import from_base64, load_json
from serve.request.limits import Limits
from serve.request.problems import BAD_REQUEST, TOO_MANY_IMAGES, Problem

INPUT, OUTPUT = "images", "logits"
_KINDS = {bool: "true or false", dict: "an object", int: "a whole number", list: "a list", str: "a string"}
_SHOWN = 60  # characters of what was found


@dataclass(frozen=True)
class Inference:
    """One request: pixels uint8 [N, H, W, C] or N encoded files, and the form of the answer."""

    id: str | None
    images: np.ndarray | list[bytes]
    num_classes: int | None  # of the `classification` extension; None asks for logits
    is_binary: bool  # the answer's tensor follows its JSON

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise Problem(BAD_REQUEST, f"classification must be 1 or more, got {self.num_classes}")


def read_inference(body: bytes, header_bytes: str | None, limits: Limits) -> Inference:
    """Parses a body. `header_bytes` is the value of Inference-Header-Content-Length, or None."""
    header, binary = _split(body, header_bytes)
    try:
        request = load_json(header)
    except ValueError as error:
        raise Problem(BAD_REQUEST, f"the inference header is not valid JSON: {error}") from error
    if not isinstance(request, dict):
        raise Problem(BAD_REQUEST, f"the inference header must be an object, got {_brief(request)}")
    asked = _only_tensor(request, "outputs", OUTPUT) if _member(request, "outputs", list, []) else {}
    parameters = _member(asked, "parameters", dict, {}, of=OUTPUT)
    for_all = _member(_member(request, "parameters", dict, {}), "binary_data_output", bool, False)
    return Inference(
        id=_member(request, "id", str, None),
        images=_read_images(_only_tensor(request, "inputs", INPUT), binary, limits),
        num_classes=_member(parameters, "classification", int, None, of=OUTPUT),
        is_binary=_member(parameters, "binary_data", bool, for_all, of=OUTPUT),
    )


def write_inference(inference: Inference, logits: np.ndarray, model: dict[str, str], labels: tuple[str, ...]) -> Any:
    """The answer's JSON, and the bytes behind it or None. Logits float32 [N, K]."""
    output, elements, content = output_of(inference, logits, labels)
    output |= {"data": elements} if content is None else {"parameters": {"binary_data_size": len(content)}}
    named = {} if inference.id is None else {"id": inference.id}
    return orjson.dumps({**model, **named, "outputs": [output]}, option=orjson.OPT_SERIALIZE_NUMPY), content


def output_of(
    inference: Inference, logits: np.ndarray, labels: tuple[str, ...]
) -> tuple[dict[str, Any], Any, bytes | None]:
    """Name, type and shape of the answer's tensor, its elements, and these as bytes if they are asked for.

    The elements are all logits, or "score:index:label" of the best classes of each image, the best first.
    """
    if not inference.num_classes:
        output = {"name": OUTPUT, "datatype": "FP32", "shape": logits.shape}
        return output, logits.ravel(), logits.astype("<f4").tobytes() if inference.is_binary else None
    order = np.argsort(-logits, axis=1, kind="stable")[:, : inference.num_classes]
    texts = [
        f"{row[index]:f}:{index}:{labels[index]}"
        for row, best in zip(logits.tolist(), order.tolist(), strict=True)
        for index in best
    ]
    output = {"name": OUTPUT, "datatype": "BYTES", "shape": order.shape}
    return output, texts, b"".join(map(_with_length, texts)) if inference.is_binary else None


def _split(body: bytes, header_bytes: str | None) -> tuple[bytes, bytes]:
    if header_bytes is None:
        return body, b""
    if not (header_bytes.isascii() and header_bytes.isdigit() and len(header_bytes) < 20):
        detail = f"Inference-Header-Content-Length must be a whole number, got {_brief(header_bytes)}"
        raise Problem(BAD_REQUEST, detail)
    size = int(header_bytes)
    if not 0 < size <= len(body):
        raise Problem(BAD_REQUEST, f"Inference-Header-Content-Length is {size}, and the body has {len(body)} bytes")
    return body[:size], body[size:]


def _only_tensor(request: dict[str, Any], field: str, name: str) -> dict[str, Any]:
    """The only entry of `inputs` or `outputs`."""
    entries = _member(request, field, list, [])
    check_name([entry.get("name") if isinstance(entry, dict) else entry for entry in entries], field, name)
    if not isinstance(entries[0], dict):
        raise Problem(BAD_REQUEST, f"{field} must be a list of objects")
    return entries[0]


def check_name(names: Sequence[Any], field: str, name: str) -> None:
    """Refuses anything but one tensor, of that name."""
    if list(names) != [name]:
        found = ", ".join(map(_brief, names[:5])) or "none"
        raise Problem(BAD_REQUEST, f"{field} must be one tensor named {name!r}, got {found}")


def check_tensor(datatype: str | None, shape: list[Any], limits: Limits) -> None:
    """Refuses anything but pixels [N, H, W, C] and files [N], and more images than `limits.max_images`."""
    rank = {"UINT8": 4, "BYTES": 1}.get(datatype or "")
    if rank is None:
        raise Problem(BAD_REQUEST, f"images must be UINT8 pixels or BYTES of image files, got {_brief(datatype)}")
    if len(shape) != rank or not all(type(size) is int and size > 0 for size in shape):
        wanted = "[N, H, W, C]" if rank == 4 else "[N]"
        found = ", ".join(map(_brief, shape[:8]))
        raise Problem(BAD_REQUEST, f"the shape of images in {datatype} must be {wanted}, got [{found}]")
    if shape[0] > limits.max_images:
        detail = f"one request takes {limits.max_images} images at most, got {shape[0]}; send the rest in another"
        raise Problem(TOO_MANY_IMAGES, detail)


def read_binary(binary: bytes, datatype: str | None, shape: list[int]) -> np.ndarray | list[bytes]:
    """The images of a checked tensor in its bytes: uint8 [N, H, W, C], or N files."""
    if datatype == "BYTES":
        return check_count(list(_cut(binary)), shape)
    return _as_pixels(binary, shape)


def read_numbers(data: list[Any], shape: list[int]) -> np.ndarray:
    """Pixels uint8 [N, H, W, C] from a flat list of whole numbers."""
    if set(map(type, data)) - {int}:
        wrong = next(value for value in data if type(value) is not int)
        raise Problem(BAD_REQUEST, f"images in UINT8 must be whole numbers, got {_brief(wrong)}")
    try:
        content = bytes(data)
    except ValueError as error:
        wrong = next(value for value in data if not 0 <= value <= 255)
        raise Problem(BAD_REQUEST, f"images in UINT8 must be from 0 to 255, got {wrong}") from error
    return _as_pixels(content, shape)


def _as_pixels(content: bytes, shape: list[int]) -> np.ndarray:
    return np.frombuffer(check_count(content, shape), np.uint8).reshape(shape)


def _read_images(tensor: dict[str, Any], binary: bytes, limits: Limits) -> np.ndarray | list[bytes]:
    shape = _member(tensor, "shape", list, [], of=INPUT)
    datatype = _member(tensor, "datatype", str, None, of=INPUT)
    check_tensor(datatype, shape, limits)
    size = _member(_member(tensor, "parameters", dict, {}, of=INPUT), "binary_data_size", int, None, of=INPUT)
    if size is None and binary:
        raise Problem(BAD_REQUEST, f"images have no binary_data_size, and {len(binary)} bytes follow the header")
    if size is not None and size != len(binary):
        raise Problem(BAD_REQUEST, f"binary_data_size of images is {size}, and {len(binary)} bytes follow the header")
    if size is not None and "data" in tensor:
        raise Problem(BAD_REQUEST, "images have data in the header and binary_data_size; send one of them")
    if size is not None:
        return read_binary(binary, datatype, shape)
    data = _member(tensor, "data", list, [], of=INPUT)
    if datatype == "BYTES":
        return check_count([from_base64(index, text) for index, text in enumerate(data)], shape)
    return read_numbers(_flatten(data, shape), shape)


def _flatten(data: list[Any], shape: list[int]) -> list[Any]:
    """The numbers in `data`, which are flat or nested as the shape."""
    if not data or not isinstance(data[0], list):
        return data
    rows = [data]
    for size in shape:
        if not all(isinstance(row, list) and len(row) == size for row in rows):
            raise Problem(BAD_REQUEST, f"the data of images is neither flat nor nested as its shape {shape}")
        rows = list(chain.from_iterable(rows))
    return rows


def _cut(binary: bytes) -> Iterator[bytes]:
    """The elements of a BYTES tensor: each a length of four bytes, little-endian, and as many bytes."""
    start = 0
    while start < len(binary):
        end = start + 4 + int.from_bytes(binary[start : start + 4], "little")
        if start + 4 > len(binary) or end > len(binary):
            raise Problem(BAD_REQUEST, f"an image of type BYTES ends at byte {end} of {len(binary)}")
        yield binary[start + 4 : end]
        start = end


def check_count(elements: Any, shape: list[int]) -> Any:
    """`elements`; refuses another number of them than the shape needs."""
    if len(elements) != (wanted := math.prod(shape)):
        raise Problem(BAD_REQUEST, f"images of shape {shape} need {wanted:,} elements, got {len(elements):,}")
    return elements


def _with_length(text: str) -> bytes:
    """An element of a BYTES tensor."""
    content = text.encode()
    return len(content).to_bytes(4, "little") + content


def _member(members: dict[str, Any], name: str, kind: type, default: Any, *, of: str = "the request") -> Any:
    """The member `name`, or `default` if it is missing or null; refuses one of another type."""
    value = members.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        raise Problem(BAD_REQUEST, f"{name} of {of} must be {_KINDS[kind]}, got {_brief(value)}")
    return value


def _brief(value: Any) -> str:
    """A value in a few characters."""
    match value:
        case list() | dict():
            return _KINDS[type(value)]
        case str():
            return repr(value[:_SHOWN])
        case _:
            return orjson.dumps(value).decode()[:_SHOWN]
