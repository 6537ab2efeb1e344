"""From a request to the bytes of its images: raw, multipart/form-data or JSON."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
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
_ANY_IMAGE = "image/"  # image/jpg, image/x-ms-bmp: what a body is, its first bytes say
_CURLS_OWN = "application/x-www-form-urlencoded"  # what curl --data-binary says unless told
LONG_JSON_BYTES = 2**16  # longer ones are read in a thread, as they would hold up the event loop
# A long document holds Python's lock while it is read: a million numbers for 20 ms, as many lists for 270 ms.
MAX_JSON_LISTS, MAX_JSON_VALUES = 2**17, 2**20
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
Read = TypeVar("Read")

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


async def read_images(receive: Receive, headers: dict[bytes, bytes], limits: Limits, turn: asyncio.Lock) -> list[bytes]:
    """The bytes of the request's images, in its order: one at least, `limits.max_images` at most.

    Who has the `turn` reads a long body of JSON.
    """
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    if encoding not in ("", "identity"):
        detail = f"the body is encoded as {encoding}; send it as it is, without Content-Encoding"
        raise Problem(MEDIA_TYPE_UNKNOWN, detail)
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in RAW_TYPES or not media_type or media_type.startswith(_ANY_IMAGE):
        return [await read_body(receive, headers, limits)]
    if media_type == "multipart/form-data":
        form = _Form(content_type, limits)
        await _receive_body(form.feed, receive, headers, limits)
        return form.finish()
    if media_type == "application/json":
        return await parse(turn, _images_of_json, await read_body(receive, headers, limits), limits)
    if media_type == _CURLS_OWN:
        body = await read_body(receive, headers, limits)
        if begins_as_an_image(body):
            return [body]
        raise Problem(MEDIA_TYPE_UNKNOWN, f"{media_type} is not an image; with curl: --data-binary @FILE")
    taken = f"{', '.join(RAW_TYPES)}, multipart/form-data or application/json"
    raise Problem(MEDIA_TYPE_UNKNOWN, f"send {taken}, got {media_type}")


async def parse(turn: asyncio.Lock, function: Callable[..., Read], body: bytes, *arguments: Any) -> Read:
    """`function(body, *arguments)`; of a long body in a thread, and of one at a time, as nobody counts what it makes.

    Who gives up leaves the turn to the thread until it has finished.
    """
    if len(body) <= LONG_JSON_BYTES:
        return function(body, *arguments)
    await turn.acquire()
    running = asyncio.get_running_loop().run_in_executor(None, function, body, *arguments)
    running.add_done_callback(lambda done: (done.cancelled() or done.exception(), turn.release()))
    try:
        return await asyncio.shield(running)
    finally:
        del running  # or its exception would hold itself, by its traceback, and the body


def load_json(document: bytes) -> Any:
    """What JSON holds. Raises ValueError where it is not valid; refuses so much that reading it holds others up."""
    num_lists = document.count(b"[") + document.count(b"{")
    num_values = document.count(b",") + num_lists
    if num_lists > MAX_JSON_LISTS or num_values > MAX_JSON_VALUES:
        raise Problem(
            TOO_LARGE,
            f"the JSON has {num_values:,} values, {num_lists:,} of them lists and objects; "
            f"{MAX_JSON_VALUES:,} and {MAX_JSON_LISTS:,} are taken; send less at once, or bytes in place of numbers",
        )
    return orjson.loads(document)


async def within_deadline(reading: Awaitable[Read], deadline: float, limits: Limits) -> Read:
    """What `reading` gives; refuses a request that is not complete at the loop's time `deadline`."""
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
    take: Callable[[bytes], None], receive: Receive, headers: dict[bytes, bytes], limits: Limits
) -> None:
    """Give `take` the body as it comes; refused by its announced length, or as soon as more than the limit has come."""
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limits.max_body_bytes:
        raise _too_large(limits)
    num_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        num_bytes += len(chunk)
        if num_bytes > limits.max_body_bytes:
            raise _too_large(limits)
        take(chunk)


class _Form:
    """The files of a form, part by part as they come. What is no file, or one too many, ends it at once."""

    def __init__(self, content_type: str, limits: Limits) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise Problem(BAD_REQUEST, "the form cannot be read: its Content-Type has no boundary")
        self._limits = limits
        self._files: list[bytearray] = []
        self._unchosen: set[int] = set()  # what a browser sends of a file input that was left empty
        self._header_name = self._disposition = b""
        self._is_whole = False
        callbacks: Any = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._read_header_name,
            "on_header_value": self._read_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._read_data,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise Problem(BAD_REQUEST, f"the form cannot be read: {error}") from error

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise Problem(BAD_REQUEST, f"the form cannot be read: {error}") from error

    def finish(self) -> list[bytes]:
        """The bytes of every file; refuses a form that ends too early or holds none."""
        if not self._is_whole:
            raise Problem(BAD_REQUEST, "the form cannot be read: it ends before its last boundary")
        files = [bytes(file) for index, file in enumerate(self._files) if file or index not in self._unchosen]
        if not files:
            raise Problem(BAD_REQUEST, "the form holds no file; with curl: -F image=@image.png")
        return files

    def _begin_part(self) -> None:
        if len(self._files) == self._limits.max_images:
            raise _too_many_images(self._limits)
        self._header_name = self._disposition = b""
        self._files.append(bytearray())

    def _read_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _read_header_value(self, data: bytes, start: int, end: int) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition += data[start:end]

    def _end_header(self) -> None:
        self._header_name = b""

    def _end_headers(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"filename" not in options:
            name = options.get(b"name", b"").decode(errors="replace")
            raise Problem(BAD_REQUEST, f"the field {name!r} holds text; send files, with curl: -F {name}=@image.png")
        if not options[b"filename"]:
            self._unchosen.add(len(self._files) - 1)

    def _read_data(self, data: bytes, start: int, end: int) -> None:
        self._files[-1] += data[start:end]

    def _end(self) -> None:
        self._is_whole = True


def _images_of_json(body: bytes, limits: Limits) -> list[bytes]:
    try:
        document = load_json(body)
    except ValueError as error:
        raise Problem(BAD_REQUEST, f"the body is no JSON: {error}") from error
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list) or not images:
        raise Problem(BAD_REQUEST, 'the JSON must be {"images": ["<base64>", ...]} with one image or more')
    if len(images) > limits.max_images:
        raise _too_many_images(limits)
    return [_from_base64(index, text) for index, text in enumerate(images)]


def _from_base64(index: int, text: Any) -> bytes:
    """Plain or URL-safe base64, in one line or many, with or without `data:image/png;base64,` before it."""
    if not isinstance(text, str):
        raise Problem(BAD_REQUEST, f"images[{index}] is no base64 text: it is no string")
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise Problem(BAD_REQUEST, f"images[{index}] is a data URL without base64; send data:image/png;base64,...")
    try:
        return base64.b64decode(text.encode("ascii").translate(_URL_SAFE, b" \t\r\n\v\f"), validate=True)
    except ValueError as error:
        raise Problem(BAD_REQUEST, f"images[{index}] is no base64 text: {error}") from error


def _too_large(limits: Limits) -> Problem:
    return Problem(TOO_LARGE, f"the body is larger than {limits.max_body_bytes:,} bytes; send less at once")


def _too_many_images(limits: Limits) -> Problem:
    return Problem(TOO_MANY_IMAGES, f"one request takes {limits.max_images} images at most; send the rest in another")
