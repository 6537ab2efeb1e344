"""Every refusal of the server, as `application/problem+json` (RFC 9457) with stable types."""

from dataclasses import dataclass
from typing import Any, NoReturn

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request

MEDIA_TYPE = "application/problem+json"
_TEXT = {"type": "string"}
_MEMBERS = {"type": {**_TEXT, "format": "uri"}, "title": _TEXT, "status": {"type": "integer"}, "detail": _TEXT}
_SCHEMA = {"type": "object", "required": list(_MEMBERS), "properties": _MEMBERS}
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

    def members(self, detail: str) -> dict[str, Any]:
        """Of the problem document."""
        return {"type": self.type, "title": self.title, "status": self.status, "detail": detail}


BAD_REQUEST = Kind("bad-request", 400, "The request cannot be understood")
UNAUTHORIZED = Kind("unauthorized", 401, "The API key is missing or wrong")
NOT_FOUND = Kind("not-found", 404, "There is nothing at this address")
METHOD_NOT_ALLOWED = Kind("method-not-allowed", 405, "This address does not accept this method")
TIMEOUT = Kind("timeout", 408, "The request arrived too slowly")
BAD_MODEL = Kind("bad-model", 409, "The new model cannot be served; the old one keeps serving")
NOT_COMPARED = Kind("not-compared", 409, "The shadow has not been compared enough")
TOO_LARGE = Kind("too-large", 413, "The request is too large")
TOO_MANY_IMAGES = Kind("too-many-images", 413, "The request holds too many images")
TOO_MANY_PIXELS = Kind("too-many-pixels", 413, "An image has too many pixels")
MEDIA_TYPE_UNKNOWN = Kind("media-type", 415, "The server does not accept this media type")
UNDECODABLE = Kind("undecodable", 422, "An image cannot be decoded")
HEADERS_TOO_LARGE = Kind("headers-too-large", 431, "The headers are too large")
INTERNAL = Kind("internal", 500, "The server failed")
NOT_A_NUMBER = Kind("not-a-number", 500, "The output of the model is not finite")
NOT_READY = Kind("not-ready", 503, "The server is starting or stopping")
OVERLOADED = Kind("overloaded", 503, "Too many requests are waiting")
DEADLINE = Kind("deadline", 504, "The answer took too long")
# How a request for a prediction may end, over every route and gRPC.
_OF_BODY = (TIMEOUT, TOO_LARGE, TOO_MANY_IMAGES, TOO_MANY_PIXELS, MEDIA_TYPE_UNKNOWN, UNDECODABLE)
OF_PREDICTION = (BAD_REQUEST, UNAUTHORIZED, *_OF_BODY, INTERNAL, NOT_A_NUMBER, NOT_READY, OVERLOADED, DEADLINE)


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
        reason = {"error": self.detail} if f"{path}/".startswith("/v2/") else {}
        return orjson.dumps({**self.kind.members(self.detail), **reason})


def documented(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of an operation that may end with one of `kinds`."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status in dict.fromkeys(kind.status for kind in kinds):
        alike = [kind for kind in kinds if kind.status == status]
        content = {"schema": _SCHEMA, "examples": {kind.name: {"value": kind.members("…")} for kind in alike}}
        description = "; ".join(kind.title for kind in alike)
        responses[status] = {"description": description, "content": {MEDIA_TYPE: content}}
    return responses


async def refuse_unrouted(request: Request, error: Exception) -> NoReturn:
    """For `FastAPI(exception_handlers=…)`: an address that does not exist, or does not take the method."""
    assert isinstance(error, HTTPException)
    if error.status_code == NOT_FOUND.status:
        raise Problem(NOT_FOUND, f"{request['path']} does not exist; /docs lists what does")
    assert error.headers  # the router raises no other
    methods = error.headers["Allow"].split(", ")
    allowed = ", ".join([*methods, "HEAD"] if "GET" in methods else methods)  # answered as GET by predict.py
    detail = f"{request['path']} takes {allowed}, got {request['visit'].method}"
    raise Problem(METHOD_NOT_ALLOWED, detail, {"Allow": allowed})
