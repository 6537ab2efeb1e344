"""Messages of the Open Inference Protocol in Protocol Buffers: images in, logits out.

A tensor is in `raw_*_contents`, as bytes, or in `contents`, typed; in the answer it is where it was in the request.

A message can become far larger in memory than it is: two bytes can be an object of a hundred, and 5 MB of empty tensors
take 223 MB. So long messages are walked field by field first, and refused if they have more fields than any request
needs.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from common.documents import read_fields
from export.runtimes.runtime import Model
from serve.request.limits import Limits
from serve.request.problems import BAD_REQUEST, TOO_LARGE, Problem
from serve.v2.routes import VERSION, model_name, refuse_unknown
from serve.v2.tensors import Inference, InputTensor, check_count, check_request, output_of, read_binary, read_numbers

pb: Any = service_pb2  # whose stubs do not say that these are messages
SHORT_BYTES = 2**16  # become 3 MB at most
MAX_FIELDS = 4096  # of a message, nested ones included; one of 64 files has 80
MAX_NUMBER_BYTES = 2**21  # of repeated numbers, which take four to eight times as much when parsed
_TYPED = {"UINT8": "uint_contents", "BYTES": "bytes_contents"}
_TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def parse(message: bytes, kind: Any) -> Any:
    """The parsed message; refuses invalid bytes."""
    try:
        if len(message) > SHORT_BYTES:
            walk(message, kind.DESCRIPTOR)
        return kind.FromString(message)
    except (DecodeError, ValueError) as error:
        raise Problem(BAD_REQUEST, f"the message is not a valid {kind.DESCRIPTOR.name}: {error}") from error


def read_inference(message: bytes, model: Model, limits: Limits) -> Inference:
    """Parses a ModelInferRequest; refuses one for another model."""
    request = parse(message, pb.ModelInferRequest)
    refuse_unknown(request.model_name, request.model_version or VERSION, model)
    members = {
        "id": request.id,
        "inputs": [
            {"name": tensor.name, "datatype": tensor.datatype, "shape": [*tensor.shape]} for tensor in request.inputs
        ],
        "outputs": [{"name": tensor.name, "parameters": _values(tensor.parameters)} for tensor in request.outputs],
    }
    checked, asked = check_request(members, limits)
    images = _read_images(checked.inputs[0], request.inputs[0].contents, request.raw_input_contents)
    return Inference(checked.id, images, asked.classification, is_binary=bool(request.raw_input_contents))


def write_inference(inference: Inference, logits: np.ndarray, model: Model) -> bytes:
    """The ModelInferResponse with logits float32 [N, K], or with the best classes."""
    output, elements, content = output_of(inference, logits, model.spec.labels)
    if inference.num_classes and not inference.is_binary:
        output["contents"] = {"bytes_contents": [text.encode() for text in elements]}
    elif not inference.is_binary:
        output["contents"] = {"fp32_contents": elements.tolist()}
    answer = pb.ModelInferResponse(
        model_name=model_name(model),
        model_version=VERSION,
        id=inference.id,
        outputs=[output],
        raw_output_contents=[content] if inference.is_binary else [],
    )
    return answer.SerializeToString()


def _values(parameters: Any) -> dict[str, Any]:
    """Parameters as in JSON; one without a value is an empty text."""
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
        for name, value in parameters.items()
    }


def _read_images(tensor: InputTensor, contents: Any, raw: Sequence[bytes]) -> np.ndarray | list[bytes]:
    typed = [field.name for field, _ in contents.ListFields()]
    if len(raw) > 1 or (raw and typed):
        found = " and ".join([f"{len(raw)} of raw_input_contents", *typed])
        raise Problem(BAD_REQUEST, f"send images in raw_input_contents or in contents, once; got {found}")
    if raw:
        return read_binary(raw[0], tensor)
    wanted = _TYPED[tensor.datatype]
    if set(typed) - {wanted}:
        raise Problem(BAD_REQUEST, f"images in {tensor.datatype} must be in {wanted}, got {', '.join(typed)}")
    if tensor.datatype == "BYTES":
        return check_count(list(contents.bytes_contents), tensor)
    return read_numbers(list(contents.uint_contents), tensor)


def walk(message: bytes, kind: Descriptor) -> None:
    """Refuses a message that would become far larger when parsed. Raises ValueError if it is not a message."""
    num_fields = num_number_bytes = 0
    parts: list[tuple[bytes | memoryview, Descriptor]] = [(message, kind)]
    while parts:
        part, kind = parts.pop()
        for number, content, _ in read_fields(part):
            num_fields += 1
            if isinstance(content, memoryview) and (inner := _children(kind).get(number)):
                if isinstance(inner, Descriptor):
                    parts.append((content, inner))
                else:
                    num_number_bytes += len(content)
            if num_fields > MAX_FIELDS:
                raise Problem(TOO_LARGE, f"the message has more than {MAX_FIELDS:,} fields; send less at once")
            if num_number_bytes > MAX_NUMBER_BYTES:
                detail = f"the message has more than {MAX_NUMBER_BYTES:,} bytes of single numbers"
                raise Problem(TOO_LARGE, f"{detail}; send pixels in raw_input_contents")


@lru_cache
def _children(kind: Descriptor) -> dict[int, Descriptor | bool]:
    """By number: which fields are messages, and True for numbers."""
    return {field.number: field.message_type or True for field in kind.fields if field.type not in _TEXTS}
