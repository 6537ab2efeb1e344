"""One request, top to bottom.

`RequestHandler` stands before the FastAPI app. It answers `POST /predict` itself, so that a prediction pays neither for
routing nor for validation by schema, and passes every other request on.
"""

import asyncio
import itertools
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from time import monotonic
from urllib.parse import parse_qs

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.request import problems
from serve.request.access import Access
from serve.request.batcher import Batcher
from serve.request.body import read_images, within_deadline
from serve.request.job import Job
from serve.request.limits import Limits
from serve.request.problems import Problem

TOP_K = 5
REFUSAL = "diracnet.refusal"  # in the scope: the Problem that the connection found with its request
NO_CLIENT = 499  # logged when the client has gone and no status is sent
_JSON, _PROBLEM = (b"content-type", b"application/json"), (b"content-type", problems.MEDIA_TYPE.encode())
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_log = logging.getLogger(__name__)
_PROCESS_ID = secrets.token_hex(6)
_numbers = itertools.count(1)


class Visit:
    """One request and its outcome. Times are in seconds; those of the job are 0 for a request without one."""

    def __init__(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        self.start = monotonic()
        self.method, self.path = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
        self.client = (scope.get("client") or ("",))[0]
        given = headers.get(b"x-request-id", b"")
        self.id = given if _REQUEST_ID.fullmatch(given) else f"{_PROCESS_ID}-{next(_numbers)}".encode()
        self.traceparent = headers.get(b"traceparent", b"")
        self.status = self.num_images = self.body_bytes = 0
        self.decode_s = self.queue_s = self.model_s = self.total_s = 0.0

    def take(self, job: Job) -> None:
        """Record the number of images and the times of a job."""
        self.num_images = job.num_images
        self.decode_s, self.queue_s, self.model_s = job.decode_s, job.queue_s, job.model_s

    def server_timing(self) -> bytes:
        """The header of that name, in milliseconds; the total is up to now."""
        times_ms = (1000 * self.decode_s, 1000 * self.queue_s, 1000 * self.model_s, 1000 * (monotonic() - self.start))
        return b"decode;dur=%.2f, queue;dur=%.2f, model;dur=%.2f, total;dur=%.2f" % times_ms


Observer = Callable[[Visit], None]  # called with every finished request


class RequestHandler:
    """The ASGI app of all HTTP requests. `app` answers those that are not `POST /predict`."""

    def __init__(
        self, app: ASGIApp, *, batcher: Batcher, limits: Limits, access: Access, observers: Sequence[Observer]
    ) -> None:
        self._app, self._batcher, self._limits, self._access, self._observers = app, batcher, limits, access, observers
        self._held_bytes = 0  # of bodies whose requests are not answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        scope["visit"] = visit = Visit(scope, headers)
        receive = self._holding(receive, visit, scope)
        try:
            if REFUSAL in scope:
                raise scope[REFUSAL]
            self._access.check(visit.path, headers)
            if visit.path == "/predict" and visit.method == "POST":
                body = await self._predict(scope, headers, receive, visit)
                await _answer(send, visit, 200, body, _JSON)
            else:
                if visit.method == "HEAD":  # answered as GET; uvicorn omits the body
                    scope = {**scope, "method": "GET"}
                await self._app(scope, receive, _with_id(send, visit))
        except Problem as problem:
            await _refuse(send, visit, problem)
        except ClientDisconnect:
            visit.status = NO_CLIENT
        except asyncio.CancelledError:  # the server stops and will not wait any longer
            if not visit.status:
                await _refuse(send, visit, Problem(problems.NOT_READY, "the server is stopping; try another one"))
            raise
        except Exception:
            _log.exception("request %s failed", visit.id.decode())
            if visit.status:  # the answer has begun: the server can only cut it off
                raise
            await _refuse(send, visit, Problem(problems.INTERNAL, "the server failed; see its log"))
        finally:
            self.finish(visit)

    def hold(self, visit: Visit, num_bytes: int) -> None:
        """Count bytes of a body; refuses more than the limit of all bodies together."""
        visit.body_bytes += num_bytes
        self._held_bytes += num_bytes
        if self._held_bytes + self._batcher.decoding.given_up_bytes > self._limits.max_held_bytes:
            detail = f"{self._limits.max_held_bytes:,} bytes of requests are held already; retry in 1 s"
            raise Problem(problems.OVERLOADED, detail, problems.RETRY)

    def finish(self, visit: Visit) -> None:
        """Release the bytes of a finished request and call the observers."""
        self._held_bytes -= visit.body_bytes
        visit.total_s = monotonic() - visit.start
        for observe in self._observers:
            observe(visit)

    def _holding(self, receive: Receive, visit: Visit, scope: Scope) -> Receive:
        """`receive` that counts bytes (see `hold`)."""

        async def receive_and_count() -> Message:
            message = await receive()
            if REFUSAL in scope:
                raise scope[REFUSAL]
            self.hold(visit, len(message.get("body", b"")))
            return message

        return receive_and_count

    async def _predict(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, visit: Visit) -> bytes:
        """`POST /predict`: bytes of images → decode → batch → model → JSON."""
        self._batcher.check_room(1)  # before the body is read: refusing an overload must be cheap
        top_k = _top_k(scope["query_string"])
        deadline = asyncio.get_running_loop().time() + self._limits.deadline_s
        images = await within_deadline(read_images(receive, headers, self._limits), deadline, self._limits)
        job = await self._batcher.classify(images, top_k=top_k, deadline=deadline, receive=receive)
        visit.take(job)
        return orjson.dumps({"model": job.served.name, "results": job.outcome})


def _top_k(query: bytes) -> int:
    if not query:
        return TOP_K
    given = parse_qs(query.decode("latin-1"), keep_blank_values=True).get("top_k", [str(TOP_K)])[-1]
    if not re.fullmatch(r"[0-9]{1,9}", given) or int(given) < 1:
        raise Problem(problems.BAD_REQUEST, f"top_k must be a whole number above 0, got {given!r}")
    return int(given)


async def _answer(send: Send, visit: Visit, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    visit.status = status
    headers = [
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", visit.id),
        _NO_SNIFFING,
        (b"server-timing", visit.server_timing()),
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse(send: Send, visit: Visit, problem: Problem) -> None:
    headers = [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    await _answer(send, visit, problem.kind.status, problem.body(visit.path), _PROBLEM, *headers)


def _with_id(send: Send, visit: Visit) -> Send:
    """`send` that adds the request's id and its times, and records the status."""

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            visit.status = message["status"]
            added = [(b"x-request-id", visit.id), _NO_SNIFFING]
            if visit.num_images:
                added += [(b"server-timing", visit.server_timing())]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return send_with_id
