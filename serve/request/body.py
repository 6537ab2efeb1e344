"""From a request to the bytes of its images: raw, multipart/form-data or JSON."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from common.image import FORMATS, begins_as_an_image
from serve.request.limits import Limits
from serve.request.problems import BAD_REQUEST, MEDIA_TYPE_UNKNOWN, TIMEOUT, TOO_LARGE, TOO_MANY_IMAGES, Problem

RAW_TYPES = (*(f"image/{kind.lower()}" for kind in FORMATS), "application/octet-stream")
_CURL_DEFAULT = "application/x-www-form-urlencoded"  # of curl --data-binary
LONG_JSON_BYTES = 2**16  # longer documents are parsed in a thread, as they would hold up the event loop
# Parsing holds Python's lock: 20 ms for a million numbers, 270 ms for as many lists.
MAX_JSON_LISTS, MAX_JSON_VALUES = 2**17, 2**20
_PARSER = ThreadPoolExecutor(1, "parse")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
Read = TypeVar("Read")

_BINARY = {"type": "string", "format": "binary"}
_FILES = {"image": {"type": "array", "items": _BINARY}}
_FORM = {"type": "object", "properties": _FILES, "additionalProperties": _BINARY}  # its fields may have any name
_BASE64 = {"type": "array", "minItems": 1, "items": {"type": "string", "contentEncoding": "base64"}}
_JSON = {"type": "object", "required": ["images"], "properties": {"images": _BASE64}}
_SCHEMAS = {**dict.fromkeys(RAW_TYPES, _BINARY), "multipart/form-data": _FORM, "application/json": _JSON}
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "description": "One image as the body, one or many as files of a form, or many in base64.",
    "content": {media_type: {"schema": schema} for media_type, schema in _SCHEMAS.items()},
}


async def read_images(receive: Receive, headers: dict[bytes, bytes], limits: Limits) -> list[bytes]:
    """The bytes of the request's images, in order: at least one, at most `limits.max_images`."""
    refuse_encoding(headers)
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type or media_type in RAW_TYPES or media_type.startswith("image/"):  # of whatever format
        return [await read_body(receive, headers, limits)]
    if media_type == "multipart/form-data":
        try:
            form = _Form(content_type, limits)
            await _receive_body(form.feed, receive, headers, limits)
            return form.finish()
        except FormParserError as error:
            raise Problem(BAD_REQUEST, f"the form cannot be read: {error}") from error
    if media_type == "application/json":
        return await parse_body(_images_of_json, await read_body(receive, headers, limits), limits)
    if media_type == _CURL_DEFAULT:
        body = await read_body(receive, headers, limits)
        if begins_as_an_image(body):
            return [body]
        raise Problem(MEDIA_TYPE_UNKNOWN, f"{media_type} is not an image; with curl: --data-binary @FILE")
    taken = f"{', '.join(RAW_TYPES)}, multipart/form-data or application/json"
    raise Problem(MEDIA_TYPE_UNKNOWN, f"send {taken}, got {media_type}")


def refuse_encoding(headers: dict[bytes, bytes]) -> None:
    """Refuses a compressed body: 20 MB of it may be 20 GB."""
    given = headers.get(b"content-encoding")
    if given and (encoding := given.decode("latin-1").strip().lower()) not in ("", "identity"):
        detail = f"the body is encoded as {encoding}; send it as it is, without Content-Encoding"
        raise Problem(MEDIA_TYPE_UNKNOWN, detail)


async def parse_body(function: Callable[..., Read], body: bytes, *arguments: Any) -> Read:
    """`function(body, *arguments)`; a long body in a thread, one at a time, as the memory it takes is not counted.

    After a cancellation the thread finishes a body that it has begun, and a body that waits for it is dropped at once.
    """
    if len(body) <= LONG_JSON_BYTES:
        return function(body, *arguments)
    held = [body]
    del body
    try:
        return await asyncio.get_running_loop().run_in_executor(_PARSER, lambda: function(held.pop(), *arguments))
    finally:
        held.clear()


def load_json(document: bytes, what: str = "the body") -> Any:
    """Parses JSON; refuses documents that would hold up other requests."""
    num_lists = document.count(b"[") + document.count(b"{")
    num_values = document.count(b",") + num_lists
    if num_lists > MAX_JSON_LISTS or num_values > MAX_JSON_VALUES:
        found = f"{num_values:,} values, {num_lists:,} of them lists and objects"
        most = f"{MAX_JSON_VALUES:,} and {MAX_JSON_LISTS:,} are accepted"
        raise Problem(TOO_LARGE, f"the JSON has {found}; {most}; send less at once, or bytes in place of numbers")
    try:
        return orjson.loads(document)
    except ValueError as error:
        raise Problem(BAD_REQUEST, f"{what} is not valid JSON: {error}") from error


async def within_deadline(reading: Awaitable[Read], deadline: float, limits: Limits) -> Read:
    """Awaits `reading`; refuses a request that is not complete at the loop's time `deadline`."""
    try:
        async with asyncio.timeout_at(deadline):
            return await reading
    except TimeoutError:
        detail = f"the request was not complete within {limits.deadline_s:g} s; send less at once"
        raise Problem(TIMEOUT, detail, {"Connection": "close"}) from None


async def read_body(receive: Receive, headers: dict[bytes, bytes], limits: Limits) -> bytes:
    """The whole body, which is neither empty nor over the limit."""
    chunks: list[bytes] = []
    await _receive_body(chunks.append, receive, headers, limits)
    body = b"".join(chunks)
    if not body:
        raise Problem(BAD_REQUEST, "the request has no body; with curl: --data-binary @FILE")
    return body


async def _receive_body(
    take: Callable[[bytes], object], receive: Receive, headers: dict[bytes, bytes], limits: Limits
) -> None:
    """Call `take` with each chunk; refuses by the announced length, or as soon as the limit is exceeded."""
    num_bytes, more, announced = 0, True, headers.get(b"content-length", b"")
    is_too_large = announced.isdigit() and int(announced) > limits.max_body_bytes
    while more and not is_too_large:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        num_bytes += len(chunk)
        is_too_large = num_bytes > limits.max_body_bytes
        if not is_too_large:
            take(chunk)
    if is_too_large:
        raise Problem(TOO_LARGE, f"the body is larger than {limits.max_body_bytes:,} bytes; send less at once")


class _Form:
    """Collects the files of a form as they arrive; refuses text fields and too many files before their data.

    Raises FormParserError for a form that is not valid.
    """

    def __init__(self, content_type: str, limits: Limits) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise FormParserError("its Content-Type has no boundary")
        self._limits = limits
        self._files: list[tuple[bytes, bytearray]] = []  # each with its file's name
        self._header_name = self._disposition = b""
        self._is_whole = False
        events = ("header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
        callbacks: Any = {f"on_{event}": getattr(self, f"_on_{event}") for event in events}
        self.feed = MultipartParser(boundary, callbacks).write  # takes the next bytes of the body

    def finish(self) -> list[bytes]:
        """The bytes of every file; refuses a form that ends too early or holds none."""
        if not self._is_whole:
            raise FormParserError("it ends before its last boundary")
        files = [bytes(file) for name, file in self._files if name or file]  # browsers send empty inputs too
        if not files:
            raise Problem(BAD_REQUEST, "the form contains no file; with curl: -F image=@image.png")
        return files

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition += data[start:end]

    def _on_header_end(self) -> None:
        self._header_name = b""

    def _on_headers_finished(self) -> None:
        options, self._disposition = parse_options_header(self._disposition)[1], b""
        if b"filename" not in options:
            name = options.get(b"name", b"").decode(errors="replace")
            raise Problem(BAD_REQUEST, f"the field {name!r} holds text; send files, with curl: -F {name}=@image.png")
        if len(self._files) == self._limits.max_images:
            raise too_many_images(self._limits)
        self._files.append((options[b"filename"], bytearray()))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._files[-1][1].extend(data[start:end])

    def _on_end(self) -> None:
        self._is_whole = True


def _images_of_json(body: bytes, limits: Limits) -> list[bytes]:
    document = load_json(body)
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list) or not images:
        raise Problem(BAD_REQUEST, 'the JSON must be {"images": ["<base64>", ...]} with one image or more')
    if len(images) > limits.max_images:
        raise too_many_images(limits)
    return [from_base64(index, text) for index, text in enumerate(images)]


def from_base64(index: int, text: Any) -> bytes:
    """Plain or URL-safe base64, in one line or many, with or without `data:image/png;base64,` before it."""
    if not isinstance(text, str):
        raise Problem(BAD_REQUEST, f"images[{index}] is not base64: it is not a string")
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise Problem(BAD_REQUEST, f"images[{index}] is a data URL without base64; send data:image/png;base64,...")
    try:
        return base64.b64decode(text.encode("ascii").translate(_URL_SAFE, b" \t\r\n\v\f"), validate=True)
    except ValueError as error:
        raise Problem(BAD_REQUEST, f"images[{index}] is not base64: {error}") from error


def too_many_images(limits: Limits) -> Problem:
    return Problem(TOO_MANY_IMAGES, f"one request takes {limits.max_images} images at most; send the rest in another")
