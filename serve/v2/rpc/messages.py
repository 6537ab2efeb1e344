"""Tensors of the Open Inference Protocol as Protocol Buffers: images come in, logits go out.

They stand in `raw_*_contents`, as bytes, or in `contents`, typed. An answer has its tensor where its request had it.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from export.runtimes.runtime import Model
from serve.request.limits import Limits
from serve.request.problems import BAD_REQUEST, Problem
from serve.v2.routes import VERSION, model_name, refuse_unknown
from serve.v2.rpc.bounds import check_size
from serve.v2.tensors import (
    INPUT,
    OUTPUT,
    Inference,
    best_classes,
    check_tensor,
    counted,
    read_binary,
    read_numbers,
    with_length,
)

pb: Any = service_pb2  # whose stubs do not say that these are messages
_TYPED = {"UINT8": "uint_contents", "BYTES": "bytes_contents"}
_SHOWN = 5  # names of what was found, and of their characters ten times as many


def parse(message: bytes, kind: Any) -> Any:
    """The message, read; refuses bytes that are none."""
    try:
        check_size(message, kind.DESCRIPTOR)
        return kind.FromString(message)
    except (DecodeError, ValueError) as error:
        raise Problem(BAD_REQUEST, f"the message is not a valid {kind.DESCRIPTOR.name}: {error}") from error


def read_inference(message: bytes, model: Model, limits: Limits) -> Inference:
    """What a ModelInferRequest asks; refused where it is not for `model`."""
    request = parse(message, pb.ModelInferRequest)
    refuse_unknown(request.model_name, request.model_version or VERSION, model)
    return Inference(
        id=request.id,
        images=_read_images(request, limits),
        num_classes=_read_classes(request),
        is_binary=bool(request.raw_input_contents),
    )


def write_inference(inference: Inference, logits: np.ndarray, model: Model) -> bytes:
    """The ModelInferResponse with logits float32 [N, K], or with the best classes."""
    answer = pb.ModelInferResponse(model_name=model_name(model), model_version=VERSION, id=inference.id)
    output = answer.outputs.add(name=OUTPUT, datatype="FP32", shape=logits.shape)
    if inference.num_classes:
        classes = best_classes(logits, model.spec.labels, inference.num_classes)
        texts = list(chain.from_iterable(classes))
        output.datatype, output.shape[:] = "BYTES", (len(classes), len(classes[0]))
        if inference.is_binary:
            answer.raw_output_contents.append(b"".join(map(with_length, texts)))
        else:
            output.contents.bytes_contents.extend(text.encode() for text in texts)
    elif inference.is_binary:
        answer.raw_output_contents.append(logits.astype("<f4").tobytes())
    else:
        output.contents.fp32_contents.extend(logits.ravel().tolist())
    return answer.SerializeToString()


def _read_images(request: Any, limits: Limits) -> np.ndarray | list[bytes]:
    tensors, raw = request.inputs, request.raw_input_contents
    if len(tensors) != 1 or tensors[0].name != INPUT:
        raise Problem(BAD_REQUEST, f"inputs must be one tensor named {INPUT!r}, got {_names(tensors)}")
    tensor, shape = tensors[0], list(tensors[0].shape)
    check_tensor(tensor.datatype, shape, limits)
    typed = [field.name for field, _ in tensor.contents.ListFields()]
    if len(raw) > 1 or (raw and typed):
        found = " and ".join([f"{len(raw)} of raw_input_contents", *typed])
        raise Problem(BAD_REQUEST, f"images must stand in raw_input_contents or in contents, once; got {found}")
    if raw:
        return read_binary(raw[0], tensor.datatype, shape)
    wanted = _TYPED[tensor.datatype]
    if set(typed) - {wanted}:
        raise Problem(BAD_REQUEST, f"images in {tensor.datatype} must stand in {wanted}, got {', '.join(typed)}")
    if tensor.datatype == "BYTES":
        return counted(list(tensor.contents.bytes_contents), shape)
    return read_numbers(list(tensor.contents.uint_contents), shape)


def _read_classes(request: Any) -> int | None:
    """Of the `classification` extension."""
    if not request.outputs:
        return None
    if len(request.outputs) != 1 or request.outputs[0].name != OUTPUT:
        raise Problem(BAD_REQUEST, f"outputs must be one tensor named {OUTPUT!r}, got {_names(request.outputs)}")
    parameters = request.outputs[0].parameters
    if "classification" not in parameters:
        return None
    asked = parameters["classification"]
    kind = asked.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise Problem(BAD_REQUEST, f"classification must be a whole number in int64_param, got {kind or 'nothing'}")
    if getattr(asked, kind) < 1:
        raise Problem(BAD_REQUEST, f"classification must be 1 or more, got {getattr(asked, kind)}")
    return getattr(asked, kind)


def _names(tensors: Sequence[Any]) -> str:
    return ", ".join(repr(tensor.name[: 10 * _SHOWN]) for tensor in tensors[:_SHOWN]) or "none"
