"""What OpenAPI says of an inference request under /v2 and of its answer."""

from typing import Any

from serve.request import problems
from serve.v2.tensors import INPUT, OUTPUT

_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_INTEGER = {"type": "integer"}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _parameters(**properties: Any) -> dict[str, Any]:
    return {**_object(**properties), "description": "What the server does not know is ignored."}


def _array(items: dict[str, Any], **bounds: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **bounds}


_SHAPE = _array({**_INTEGER, "minimum": 1}, minItems=1, maxItems=4)
_INPUT = _object(
    "name",
    "shape",
    "datatype",
    name={"const": INPUT},
    shape=_SHAPE,
    datatype={"enum": ["UINT8", "BYTES"]},
    data={"type": "array", "description": "Pixels from 0 to 255, flat or nested as the shape; or files in base64."},
    parameters=_parameters(binary_data_size={**_INTEGER, "minimum": 0}),
)
_ASKED = _object(
    "name",
    name={"const": OUTPUT},
    parameters=_parameters(classification={**_INTEGER, "minimum": 1}, binary_data={"type": "boolean"}),
)
_INFERENCE = _object(
    "inputs",
    id={"type": "string"},
    parameters=_parameters(binary_data_output={"type": "boolean"}),
    inputs=_array(_INPUT, minItems=1, maxItems=1),
    outputs=_array(_ASKED, maxItems=1),
)
_OUTPUT = _object(
    "name",
    "shape",
    "datatype",
    name={"const": OUTPUT},
    shape=_array(_INTEGER, minItems=2, maxItems=2),
    datatype={"enum": ["FP32", "BYTES"]},
    data=_array({"type": ["number", "string"]}),
)
_ANSWER = _object(
    "model_name",
    "model_version",
    "outputs",
    model_name={"type": "string"},
    model_version={"type": "string"},
    id={"type": "string"},
    outputs=_array(_OUTPUT, minItems=1, maxItems=1),
)
_HEADER = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Bytes of JSON in the body; tensors follow it. Without this header all of the body is JSON.",
    "schema": {**_INTEGER, "minimum": 1},
}

INFER_REQUEST: dict[str, Any] = {
    "parameters": [_HEADER],
    "requestBody": {"required": True, "content": {"application/json": {"schema": _INFERENCE}, **_BINARY}},
}
INFER_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "One row per image.", "content": {"application/json": {"schema": _ANSWER}, **_BINARY}},
    **problems.documented(*problems.OF_PREDICTION, problems.NOT_FOUND),
}
