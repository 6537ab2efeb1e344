"""A client's requests, retries and reading of answers, without any connection.

A conversation is a generator: it yields what to `Send` and when, is sent the response, or the `httpx.TransportError`
in place of one, and returns its result. `serve/client.py` runs conversations with threads or with asyncio.
"""

import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union

from common.files import read_whole
from common.refusal import Refusal

if TYPE_CHECKING:
    import httpx
    import numpy as np

Image = Union[str, Path, bytes, "np.ndarray"]
Outcome = TypeVar("Outcome")
Content = TypeVar("Content", bytes, bytes | Refusal)
Reply = Union["httpx.Response", "httpx.TransportError"]
Conversation = Generator["Send", Reply, Outcome]
Conversations = Iterator[Conversation[list[Outcome]]]

# Overload, a rate-limiting proxy, and a proxy that lost its server. A prediction changes nothing, so a retry is safe.
# Ray's proxy answers 500 when a replica was killed; the server's own 500 is a problem document, and is not retried.
RETRIED = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE)
PROBLEM = "application/problem+json"
# The images of a request are too large, too many, or not decodable.
OF_AN_IMAGE = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
NOT_A_NUMBER = "urn:diracnet:problem:not-a-number"  # the net's logits of an image are not finite


@dataclass(frozen=True)
class Guess:
    """One class and the probability the model gives it."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Result(Guess):
    """The most probable class of one image, and the `top_k` most probable ones in order."""

    top: tuple[Guess, ...]


class ServerProblem(Refusal):
    """The server answers with an error. The attributes are those of its problem document (RFC 9457)."""

    def __init__(self, *, type: str, title: str, status: int, detail: str) -> None:
        super().__init__(f"the server refuses: {detail or title} ({status}, {type})")
        self.type, self.title, self.status, self.detail = type, title, status, detail


class Unreachable(Refusal):
    """The server does not answer."""


@dataclass(frozen=True)
class Send:
    """A request to make after `after_s` seconds; `body` is what `httpx.Client.request` takes."""

    method: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    after_s: float = 0.0


@dataclass(frozen=True)
class Retry:
    """How often and how long to retry after 429, 502, 503, a proxy's 500 or a lost connection."""

    attempts: int = 5
    total_s: float = 30.0  # no attempt starts later than this after the first
    first_wait_s: float = 0.1  # at most, doubled for each attempt
    longest_wait_s: float = 5.0

    def wait_s(self, attempt: int, asked_s: float) -> float:
        """Seconds after `attempt`, counted from 1: the server's `Retry-After`, and a random share of the backoff."""
        return asked_s + random.uniform(0, min(self.longest_wait_s, self.first_wait_s * 2 ** (attempt - 1)))


DEFAULT_RETRY = Retry()


@dataclass(frozen=True)
class Bounds:
    """How images are divided into requests, and how many requests run at once."""

    images_per_request: int = 32
    bytes_per_request: int = 8 * 2**20
    requests_at_once: int = 4


DEFAULT_BOUNDS = Bounds()


def exchange(
    send: Send, retry: Retry, *, clock: Callable[[], float] = time.monotonic
) -> "Conversation[httpx.Response]":
    """Send until the reply is not transient (`_is_transient`), within the bounds of `retry`."""
    import httpx

    start, attempt = clock(), 1
    reply = yield send
    while _is_transient(reply) and attempt < retry.attempts:
        wait_s = retry.wait_s(attempt, retry_after_s(reply) if isinstance(reply, httpx.Response) else 0.0)
        if clock() - start + wait_s > retry.total_s:
            break
        reply = yield replace(send, after_s=wait_s)
        attempt += 1
    if isinstance(reply, httpx.TransportError):
        url, reason = reply.request.url.copy_with(query=None), str(reply) or type(reply).__name__
        raise Unreachable(f"no answer from {url} ({reason}); is the server running there?")
    if not reply.is_success:
        raise read_problem(reply)
    return reply


def predict(contents: list[bytes], *, top_k: int, retry: Retry) -> Conversation[list[Result]]:
    """One request for the bytes of one image or many; one result per image, in their order."""
    if not contents:
        raise Refusal("there is no image to send; pass at least one")
    if len(contents) == 1:
        body: dict[str, Any] = {"content": contents[0], "headers": {"Content-Type": "application/octet-stream"}}
    else:
        body = {"files": [("image", (str(index), content)) for index, content in enumerate(contents)]}
    response = yield from exchange(Send("POST", "/predict", {"params": {"top_k": top_k}, **body}), retry)
    return read_results(response, len(contents))


def predict_each(contents: list[bytes | Refusal], *, top_k: int, retry: Retry) -> Conversation[list[Result | Refusal]]:
    """`predict`, but an image that the server refuses gets its `ServerProblem` in place of a result.

    A request that is refused because of its images is sent again in halves, until the bad images are alone. A `Refusal`
    in `contents`, for a file that could not be read, is not sent and stays in its place.
    """
    readable = [content for content in contents if isinstance(content, bytes)]
    answers = iter((yield from _predict_halves(readable, top_k=top_k, retry=retry)) if readable else ())
    return [next(answers) if isinstance(content, bytes) else content for content in contents]


def _predict_halves(contents: list[bytes], *, top_k: int, retry: Retry) -> Conversation[list[Result | Refusal]]:
    try:
        return [*(yield from predict(contents, top_k=top_k, retry=retry))]
    except ServerProblem as problem:
        if problem.status not in OF_AN_IMAGE and problem.type != NOT_A_NUMBER:
            raise
        if len(contents) == 1:
            return [problem]
    middle = len(contents) // 2
    first = yield from _predict_halves(contents[:middle], top_k=top_k, retry=retry)
    return first + (yield from _predict_halves(contents[middle:], top_k=top_k, retry=retry))


def get_model(*, retry: Retry) -> Conversation[dict[str, Any]]:
    """The server's description of its model."""
    return (yield from exchange(Send("GET", "/model"), retry)).json()


def encode(image: Image) -> bytes:
    """A path → the file's bytes; bytes → themselves; pixels uint8 [H, W] or [H, W, 1 or 3] → a PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return read_whole(Path(image))
    import io

    from PIL import Image as Pillow

    if image.dtype != "uint8" or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):
        raise Refusal(f"pixels must be uint8 [H, W], [H, W, 1] or [H, W, 3], got {image.dtype} {list(image.shape)}")
    file = io.BytesIO()
    Pillow.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def encode_all(images: Iterable[Image]) -> list[bytes]:
    if isinstance(images, str | bytes | Path):
        raise Refusal("images must be a list, got one image; put it in brackets")
    return [encode(image) for image in images]


def encode_if_readable(image: Image) -> bytes | Refusal:
    """`encode`, or the reason why it fails; an empty file alone would be a request without a body."""
    try:
        return encode(image) or Refusal("the file is empty")
    except Refusal as refusal:
        return refusal


def in_requests(contents: Iterable[Content], bounds: Bounds) -> Iterator[list[Content]]:
    """Encoded images in groups, in order; a group is within `bounds`, or one image that is larger."""
    group: list[Content] = []
    for content in contents:
        is_full = len(group) == bounds.images_per_request
        if group and (is_full or sum(map(_size, group)) + _size(content) > bounds.bytes_per_request):
            yield group
            group = []
        group.append(content)
    if group:
        yield group


def _size(content: bytes | Refusal) -> int:
    return len(content) if isinstance(content, bytes) else 0


def retry_after_s(response: "httpx.Response") -> float:
    """The seconds of `Retry-After`, from seconds or a date; 0 if it is missing or invalid."""
    asked = response.headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    until = _date(asked)
    now = _date(response.headers.get("Date", "")) or datetime.now(UTC)  # the server's clock, if it is known
    return max(0.0, (until - now).total_seconds()) if until else 0.0


def read_problem(response: "httpx.Response") -> ServerProblem:
    """The problem document of an answer; without one, a problem made from the status alone."""
    try:
        document = response.json()
        fields = {name: str(document[name]) for name in ("type", "title", "detail")}
    except (ValueError, TypeError, KeyError):
        fields = {"type": "about:blank", "title": response.reason_phrase, "detail": ""}
    return ServerProblem(status=response.status_code, **fields)


def read_results(response: "httpx.Response", num_images: int) -> list[Result]:
    """The results of an answer; refuses anything else than an answer of this server."""
    try:
        results = [
            Result(**{**result, "top": tuple(Guess(**guess) for guess in result["top"])})
            for result in response.json()["results"]
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise Refusal(f"the answer of {response.url} is not a prediction; is it another program?") from error
    if len(results) != num_images:
        raise Refusal(f"{response.url} answers with {len(results)} results for {num_images} images")
    return results


def _is_transient(reply: Reply) -> bool:
    """Whether the same request may soon get another reply."""
    import httpx

    if isinstance(reply, httpx.TransportError):
        return isinstance(reply, httpx.NetworkError | httpx.ConnectTimeout | httpx.RemoteProtocolError)
    is_problem = reply.headers.get("Content-Type", "").startswith(PROBLEM)
    return reply.status_code in RETRIED or (reply.status_code == 500 and not is_problem)


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
