"""From a request to the bytes of its images: raw, multipart/form-data or JSON."""

import base64
import json
from collections.abc import AsyncGenerator
from typing import Any

from anyio import to_thread
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve.limits import Limits
from serve.problems import BAD_REQUEST, MEDIA_TYPE_UNKNOWN, TOO_LARGE, TOO_MANY_IMAGES, Problem

RAW_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "application/octet-stream")
_RAW_ALIASES = ("", "image/jpg", "image/x-ms-bmp", "image/x-bmp")  # what some clients say instead

_BINARY = {"type": "string", "format": "binary"}
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "description": "One image as the body, one or many as files of a form, or many in base64.",
    "content": {
        **{media_type: {"schema": _BINARY} for media_type in RAW_TYPES},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "description": "File parts; the fields may have any name.",
                "properties": {"image": {"type": "array", "items": _BINARY}},
                "additionalProperties": _BINARY,
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {
                    "images": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "string", "contentEncoding": "base64"},
                    }
                },
            }
        },
    },
}


async def read_images(request: Request, limits: Limits) -> list[bytes]:
    """The bytes of the request's images, in its order: one at least, `limits.max_images` at most."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type in RAW_TYPES or media_type in _RAW_ALIASES:
        contents = [await _read_body(request, limits)]
    elif media_type == "multipart/form-data":
        contents = await _images_of_form(request, await _read_body(request, limits), limits)
    elif media_type == "application/json":
        contents = await to_thread.run_sync(_images_of_json, await _read_body(request, limits), limits)
    else:
        raise Problem(MEDIA_TYPE_UNKNOWN, _media_type_detail(media_type))
    return contents


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The whole body; refused by its announced length, or as soon as more than the limit has come."""
    too_large = Problem(TOO_LARGE, f"the body is larger than {limits.max_body_bytes:,} bytes; send less at once")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.max_body_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > limits.max_body_bytes:
            raise too_large
        body += chunk
    if not body:
        raise Problem(BAD_REQUEST, "the request has no body; with curl: --data-binary @image.png")
    return bytes(body)


async def _images_of_form(request: Request, body: bytes, limits: Limits) -> list[bytes]:
    parser = MultiPartParser(request.headers, _once(body), max_files=limits.max_images)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many_images(limits) from error
        raise Problem(BAD_REQUEST, f"the form cannot be read: {error.message}") from error
    except FormParserError as error:
        raise Problem(BAD_REQUEST, f"the form cannot be read: {error}") from error
    try:
        contents = []
        for name, part in form.multi_items():
            if not isinstance(part, UploadFile):
                raise Problem(
                    BAD_REQUEST, f"the field {name!r} holds text; send files, with curl: -F {name}=@image.png"
                )
            contents.append(await part.read())
    finally:
        await form.close()
    if not contents:
        raise Problem(BAD_REQUEST, "the form holds no file; with curl: -F image=@image.png")
    return contents


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


def _images_of_json(body: bytes, limits: Limits) -> list[bytes]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(BAD_REQUEST, f"the body is no JSON: {error}") from error
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list) or not images:
        raise Problem(BAD_REQUEST, 'the JSON must be {"images": ["<base64>", ...]} with one image or more')
    if len(images) > limits.max_images:
        raise _too_many_images(limits)
    return [_from_base64(index, text) for index, text in enumerate(images)]


def _from_base64(index: int, text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise Problem(BAD_REQUEST, f"images[{index}] is no base64 text: {error}") from error


def _too_many_images(limits: Limits) -> Problem:
    return Problem(TOO_MANY_IMAGES, f"one request takes {limits.max_images} images at most; send the rest in another")


def _media_type_detail(media_type: str) -> str:
    if media_type == "application/x-www-form-urlencoded":  # what curl -d and --data-binary say unless told
        return f"{media_type} is no image; add -H 'Content-Type: image/png' (any image type will do)"
    return f"send {', '.join(RAW_TYPES)}, multipart/form-data or application/json, got {media_type}"
