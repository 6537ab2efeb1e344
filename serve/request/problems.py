"""Every refusal of the server, as `application/problem+json` (RFC 9457) with stable types."""

from dataclasses import dataclass
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"
RETRY = {"Retry-After": "1"}  # seconds


@dataclass(frozen=True)
class Kind:
    """A kind of problem. Clients may rely on its `type`."""

    name: str
    status: int
    title: str

    @property
    def type(self) -> str:
        return f"urn:diracnet:problem:{self.name}"


BAD_REQUEST = Kind("bad-request", 400, "The request cannot be understood")
UNAUTHORIZED = Kind("unauthorized", 401, "The server asks for its API key")
NOT_FOUND = Kind("not-found", 404, "There is nothing at this address")
METHOD_NOT_ALLOWED = Kind("method-not-allowed", 405, "This address does not take this method")
TIMEOUT = Kind("timeout", 408, "The request came too slowly")
BAD_MODEL = Kind("bad-model", 409, "The new model cannot be served; the old one goes on")
NOT_COMPARED = Kind("not-compared", 409, "The shadow has not been compared enough")
TOO_LARGE = Kind("too-large", 413, "The request is too large")
TOO_MANY_IMAGES = Kind("too-many-images", 413, "The request holds too many images")
TOO_MANY_PIXELS = Kind("too-many-pixels", 413, "An image has too many pixels")
MEDIA_TYPE_UNKNOWN = Kind("media-type", 415, "The server does not take this media type")
UNDECODABLE = Kind("undecodable", 422, "An image cannot be decoded")
HEADERS_TOO_LARGE = Kind("headers-too-large", 431, "The headers are too large")
INTERNAL = Kind("internal", 500, "The server failed")
NOT_A_NUMBER = Kind("not-a-number", 500, "The model gave values that are no numbers")
NOT_READY = Kind("not-ready", 503, "The server is starting or stopping")
OVERLOADED = Kind("overloaded", 503, "Too much is waiting")
DEADLINE = Kind("deadline", 504, "The answer took too long")
# How a request for a prediction may end, over every route and gRPC.
OF_PREDICTION = (
    BAD_REQUEST,
    UNAUTHORIZED,
    TIMEOUT,
    TOO_LARGE,
    TOO_MANY_IMAGES,
    TOO_MANY_PIXELS,
    MEDIA_TYPE_UNKNOWN,
    UNDECODABLE,
    INTERNAL,
    NOT_A_NUMBER,
    NOT_READY,
    OVERLOADED,
    DEADLINE,
)


class Problem(Exception):
    """Ends a request with `kind`; `detail` says what was wrong, what was found and what to do."""

    def __init__(self, kind: Kind, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.headers = headers or {}

    def body(self, path: str) -> bytes:
        """The problem document for a request to `path`.

        Under /v2 it has the member `error`, where the Open Inference Protocol expects the reason.
        """
        kind, reason = self.kind, {"error": self.detail} if f"{path}/".startswith("/v2/") else {}
        members = {"type": kind.type, "title": kind.title, "status": kind.status, "detail": self.detail, **reason}
        return orjson.dumps(members)


def documented(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of an operation that may end with one of `kinds`."""
    text = {"type": "string"}
    members = {"type": {**text, "format": "uri"}, "title": text, "status": {"type": "integer"}, "detail": text}
    schema = {"type": "object", "required": list(members), "properties": members}
    responses: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        example = {"value": {"type": kind.type, "title": kind.title, "status": kind.status, "detail": "…"}}
        if kind.status not in responses:
            content = {MEDIA_TYPE: {"schema": schema, "examples": {kind.name: example}}}
            responses[kind.status] = {"description": kind.title, "content": content}
        else:
            responses[kind.status]["description"] += f"; {kind.title}"
            responses[kind.status]["content"][MEDIA_TYPE]["examples"][kind.name] = example
    return responses


async def answer_problem(request: Request, problem: Problem) -> Response:
    """For `FastAPI(exception_handlers=…)`."""
    path = request["path"].removeprefix(request.get("root_path", ""))
    return Response(problem.body(path), problem.kind.status, problem.headers, MEDIA_TYPE)


async def answer_unrouted(request: Request, error: HTTPException) -> Response:
    """The same for an address that does not exist, or does not take the method."""
    if error.status_code == NOT_FOUND.status:
        detail = f"{request['path']} does not exist; /docs lists what does"
        return await answer_problem(request, Problem(NOT_FOUND, detail))
    assert error.headers  # the router raises no other
    methods = error.headers["Allow"].split(", ")
    allowed = ", ".join([*methods, "HEAD"] if "GET" in methods else methods)  # answered as GET by predict.py
    detail = f"{request['path']} takes {allowed}, got {request['visit'].method}"
    return await answer_problem(request, Problem(METHOD_NOT_ALLOWED, detail, {"Allow": allowed}))
