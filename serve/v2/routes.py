"""The Open Inference Protocol, version 2: what clients of Triton and KServe ask a server."""

import asyncio
import re
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from typing_extensions import TypedDict  # pydantic reads no other one on Python 3.11

from export.runtimes.runtime import Model
from serve.request import problems
from serve.request.batcher import Batcher
from serve.request.body import parse_body, read_body, refuse_encoding, within_deadline
from serve.request.limits import Limits
from serve.request.problems import Problem
from serve.v2.tensors import Inference, InferenceAnswer, InferenceRequest, read_inference, write_inference

VERSION = "1"  # of every model: a new one replaces the old
HEADER_BYTES = "Inference-Header-Content-Length"


class ServerMetadata(TypedDict):
    """The server and its extensions of the protocol."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    """A tensor's name, type and shape; -1 stands for any number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """The model's tensors. `images` may be BYTES [-1] too: files, decoded and resized by the server."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Live(TypedDict):
    live: bool


class Ready(TypedDict):
    ready: bool


class ModelReady(Ready):
    name: str


def make_router(batcher: Batcher, limits: Limits) -> APIRouter:
    """All routes under /v2."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("", responses=problems.documented(problems.UNAUTHORIZED))
    async def describe_server(request: Request) -> ServerMetadata:
        """The server and its extensions of the protocol."""
        app, extensions = request.app, ["binary_tensor_data", "classification"]
        return {"name": app.title, "version": app.version, "extensions": extensions}

    @router.get("/health/live")
    async def live() -> Live:
        """The process answers."""
        return {"live": True}

    @router.get("/health/ready", responses=problems.documented(problems.NOT_READY))
    async def ready() -> Ready:
        """The model answers."""
        batcher.check_ready()
        return {"ready": True}

    async def find(name: str) -> None:
        refuse_unknown(name, VERSION, batcher.served.model)

    async def find_version(name: str, version: str) -> None:
        refuse_unknown(name, version, batcher.served.model)

    of_model = _make_model_router(batcher, limits)
    router.include_router(of_model, prefix="/models/{name}", dependencies=[Depends(find)])
    router.include_router(of_model, prefix="/models/{name}/versions/{version}", dependencies=[Depends(find_version)])
    return router


def _make_model_router(batcher: Batcher, limits: Limits) -> APIRouter:
    router, refusals = APIRouter(), (problems.UNAUTHORIZED, problems.NOT_FOUND)

    @router.get("", responses=problems.documented(*refusals))
    async def describe_model() -> ModelMetadata:
        """The model's tensors."""
        return model_metadata(batcher)

    @router.get("/ready", responses=problems.documented(*refusals, problems.NOT_READY))
    async def model_ready() -> ModelReady:
        """The model answers."""
        batcher.check_ready()
        return {"name": model_name(batcher.served.model), "ready": True}

    @router.post("/infer", responses=_INFER_RESPONSES, openapi_extra=_INFER_REQUEST)
    async def infer(request: Request) -> Response:
        """Images in, logits or the best classes out, in JSON or as bytes behind it."""
        deadline, headers = asyncio.get_running_loop().time() + limits.deadline_s, dict(request.headers.raw)
        batcher.check_room(1)  # before the body is read, as in serve/request/predict.py
        refuse_encoding(headers)
        body = await within_deadline(read_body(request.receive, headers, limits), deadline, limits)
        inference = await parse_body(read_inference, body, request.headers.get(HEADER_BYTES), limits)
        refuse_other_size(inference, batcher.served.model)
        job = await batcher.classify(inference.images, top_k=1, deadline=deadline, receive=request.receive)
        request.scope["visit"].take(job)
        model = job.served.model
        named = {"model_name": model_name(model), "model_version": VERSION}
        header, binary = write_inference(inference, job.logits, named, model.spec.labels)
        if binary is None:
            return Response(header, media_type="application/json")
        return Response(header + binary, 200, {HEADER_BYTES: str(len(header))}, "application/octet-stream")

    return router


def model_metadata(batcher: Batcher) -> ModelMetadata:
    """The tensors of the model that answers now."""
    runtime = batcher.served.runtimes[0]
    spec = runtime.model.spec
    return {
        "name": model_name(runtime.model),
        "versions": [VERSION],
        "platform": runtime.platform,
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, *spec.image.shape]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, len(spec.labels)]}],
    }


def model_name(model: Model) -> str:
    """The name of a model in an address: as export/to_triton.py takes it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", model.name)


def refuse_unknown(name: str, version: str, model: Model) -> None:
    """Refuses any model but the served one."""
    if (name, version) != (model_name(model), VERSION):
        served = f"{model_name(model)!r}, version {VERSION!r}"
        raise Problem(problems.NOT_FOUND, f"the model here is {served}; got {name[:60]!r}, version {version[:60]!r}")


def refuse_other_size(inference: Inference, model: Model) -> None:
    """Refuses pixels of another size than the model's: they are not resized."""
    wanted = model.spec.image.shape
    if isinstance(inference.images, np.ndarray) and inference.images.shape[1:] != wanted:
        found = list(inference.images.shape)
        detail = f"{model.name} takes images of shape [N, {', '.join(map(str, wanted))}], got {found}"
        raise Problem(problems.BAD_REQUEST, f"{detail}; resize them, or send files as BYTES")


# The description of `infer` in OpenAPI


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """`schema` with definitions in place of the references to them, which OpenAPI would resolve elsewhere."""
    match schema:
        case {"$ref": str(reference)}:
            return _inlined(definitions[reference.rpartition("/")[2]], definitions)
        case dict():
            return {name: _inlined(part, definitions) for name, part in schema.items() if name != "$defs"}
        case list():
            return [_inlined(part, definitions) for part in schema]
    return schema


_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_TEXT = "Bytes of JSON in the body; tensors follow it. Without this header all of the body is JSON."
_SCHEMA = InferenceRequest.model_json_schema()
_CONTENT = {"application/json": {"schema": _inlined(_SCHEMA, _SCHEMA["$defs"])}, **_BINARY}
_INFER_REQUEST: dict[str, Any] = {
    "parameters": [
        {"name": HEADER_BYTES, "in": "header", "description": _TEXT, "schema": {"type": "integer", "minimum": 1}}
    ],
    "requestBody": {"required": True, "content": _CONTENT},
}
_INFER_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "One row per image.", "model": InferenceAnswer, "content": _BINARY},
    **problems.documented(*problems.OF_PREDICTION, problems.NOT_FOUND),
}
