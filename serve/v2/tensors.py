"""Requests and answers of the Open Inference Protocol, in JSON or as bytes behind it: images in, logits out.

A body is a JSON header followed by the bytes of tensors that are not in the header itself. The HTTP header
`Inference-Header-Content-Length` says where the JSON ends; without it the whole body is JSON.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import orjson
from pydantic import BaseModel, Field, PositiveInt, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import TypedDict  # pydantic reads no other one on Python 3.11

from export.runtimes.runtime import best
from serve.request.body import from_base64, load_json, too_many_images
from serve.request.limits import Limits
from serve.request.problems import BAD_REQUEST, Problem

_SHOWN = 60  # characters of what was found


class Parameters(BaseModel):
    """Extensions of the protocol: the first of an input, the next two of an output, the last of the request."""

    binary_data_size: int | None = None
    classification: PositiveInt | None = None  # so many of the best classes in place of logits
    binary_data: bool | None = None
    binary_data_output: bool | None = None


_NO_PARAMETERS = Parameters()


class InputTensor(BaseModel):
    """UINT8 [N, H, W, C], pixels from 0 to 255, or BYTES [N], image files."""

    name: Literal["images"]
    datatype: Literal["UINT8", "BYTES"]
    shape: Annotated[list[PositiveInt], Field(min_length=1, max_length=4)]
    data: list[Any] | None = Field(None, description="Pixels, flat or nested as the shape; or files in base64.")
    parameters: Parameters | None = None


class RequestedOutput(BaseModel):
    name: Literal["logits"]
    parameters: Parameters | None = None


class InferenceRequest(BaseModel):
    id: str | None = None
    parameters: Parameters | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=1)] | None = None


class OutputTensor(TypedDict):
    name: Literal["logits"]
    shape: list[int]
    datatype: Literal["FP32", "BYTES"]
    data: NotRequired[list[float | str]]


class InferenceAnswer(TypedDict):
    model_name: str
    model_version: str
    id: NotRequired[str]
    outputs: list[OutputTensor]


@dataclass(frozen=True)
class Inference:
    """One request: pixels uint8 [N, H, W, C] or N encoded files, and the form of the answer."""

    id: str | None
    images: np.ndarray | list[bytes]
    num_classes: int | None  # of the `classification` extension; None asks for logits
    is_binary: bool  # the answer's tensor follows its JSON


def read_inference(body: bytes, header_bytes: str | None, limits: Limits) -> Inference:
    """Parses a body. `header_bytes` is the value of Inference-Header-Content-Length, or None."""
    header, binary = _split(body, header_bytes)
    request, asked = check_request(load_json(header, "the inference header"), limits)
    of_all = request.parameters or _NO_PARAMETERS
    return Inference(
        id=request.id,
        images=_read_images(request.inputs[0], binary),
        num_classes=asked.classification,
        is_binary=bool(of_all.binary_data_output if asked.binary_data is None else asked.binary_data),
    )


def check_request(members: Any, limits: Limits) -> tuple[InferenceRequest, Parameters]:
    """A request for pixels [N, H, W, C] or files [N], at most `limits.max_images`, and how it wants the answer."""
    try:
        request = InferenceRequest.model_validate(members, strict=True)
    except ValidationError as error:
        raise Problem(BAD_REQUEST, "; ".join(map(_explain, error.errors()[:5]))) from error
    tensor = request.inputs[0]
    rank, wanted = (1, "[N]") if tensor.datatype == "BYTES" else (4, "[N, H, W, C]")
    if len(tensor.shape) != rank:
        raise Problem(BAD_REQUEST, f"the shape of images in {tensor.datatype} must be {wanted}, got {tensor.shape}")
    if tensor.shape[0] > limits.max_images:
        raise too_many_images(limits)
    asked = request.outputs[0].parameters if request.outputs else None
    return request, asked or _NO_PARAMETERS


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
        output = {"name": "logits", "datatype": "FP32", "shape": logits.shape}
        return output, logits.ravel(), logits.astype("<f4").tobytes() if inference.is_binary else None
    order = best(logits, inference.num_classes)
    texts = [
        f"{row[index]:f}:{index}:{labels[index]}"
        for row, classes in zip(logits.tolist(), order.tolist(), strict=True)
        for index in classes
    ]
    output = {"name": "logits", "datatype": "BYTES", "shape": order.shape}
    return output, texts, b"".join(map(_with_length, texts)) if inference.is_binary else None


def read_binary(binary: bytes, tensor: InputTensor) -> np.ndarray | list[bytes]:
    """The images in the bytes of a checked tensor: uint8 [N, H, W, C], or N files."""
    if tensor.datatype == "BYTES":
        return check_count(list(_cut(binary)), tensor)
    return np.frombuffer(check_count(binary, tensor), np.uint8).reshape(tensor.shape)


def read_numbers(data: list[Any], tensor: InputTensor) -> np.ndarray | list[bytes]:
    """Pixels uint8 [N, H, W, C] from a flat list of whole numbers."""
    with suppress(ValueError):
        if set(map(type, data)) <= {int}:
            return read_binary(bytes(data), tensor)
    wrong = next(value for value in data if type(value) is not int or not 0 <= value <= 255)
    raise Problem(BAD_REQUEST, f"images in UINT8 must be whole numbers from 0 to 255, got {_brief(wrong)}")


def check_count(elements: Any, tensor: InputTensor) -> Any:
    """`elements`; refuses another number of them than the tensor's shape needs."""
    if len(elements) != (wanted := math.prod(tensor.shape)):
        raise Problem(BAD_REQUEST, f"images of shape {tensor.shape} need {wanted:,} elements, got {len(elements):,}")
    return elements


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


def _read_images(tensor: InputTensor, binary: bytes) -> np.ndarray | list[bytes]:
    size, data = (tensor.parameters or _NO_PARAMETERS).binary_data_size, tensor.data or []
    if (size or 0) != len(binary):
        detail = f"binary_data_size of images is {size or 0}, and {len(binary)} bytes follow the header"
        raise Problem(BAD_REQUEST, detail)
    if size is not None and data:
        raise Problem(BAD_REQUEST, "images have data in the header and binary_data_size; send one of them")
    if size is not None:
        return read_binary(binary, tensor)
    if tensor.datatype == "BYTES":
        return check_count([from_base64(index, text) for index, text in enumerate(data)], tensor)
    return read_numbers(_flatten(data, tensor.shape), tensor)


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


def _with_length(text: str) -> bytes:
    """An element of a BYTES tensor."""
    content = text.encode()
    return len(content).to_bytes(4, "little") + content


def _explain(fault: ErrorDetails) -> str:
    place = ".".join(map(str, fault["loc"])) or "the request"
    return f"{place}: {fault['msg']}, got {_brief(fault['input'])}"


def _brief(value: Any) -> str:
    """A value in a few characters."""
    shown = value[:_SHOWN] if isinstance(value, str) else value  # all of a long text would take a tenth of a second
    return {dict: "an object", list: "a list"}.get(type(value)) or repr(shown)[:_SHOWN]
