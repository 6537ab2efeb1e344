"""The Open Inference Protocol over gRPC, on the event loop of HTTP, with the same limits, key, queue and model.

Every method is registered as one that takes a stream, which is the same on the wire: a call without the key, or one
that would be refused anyway, is answered before its message is received.
"""

import asyncio
import logging
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from time import monotonic
from typing import Any, cast
from urllib.parse import unquote

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C library writes to stderr, and not in JSON

import grpc
from fastapi import FastAPI
from grpc import StatusCode

from serve.request import problems
from serve.request.access import Access
from serve.request.batcher import Batcher
from serve.request.body import parse_body
from serve.request.limits import Limits
from serve.request.predict import NO_CLIENT, RequestHandler, Visit
from serve.request.problems import RETRY, Problem
from serve.v2.grpc_messages import parse, pb, read_inference, write_inference
from serve.v2.routes import VERSION, model_metadata, model_name, refuse_other_size, refuse_unknown

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_SETTLE_S = 0.3  # for clients to learn that the server stops
_LAST_WORDS_S = 1.0  # for calls that are refused at the end of a drain
_DETAIL_BYTES = 1500  # of a refusal: clients take 8 KB of metadata, where a byte that is not ASCII takes three
_log = logging.getLogger(__name__)
STATUS_OF_HTTP = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    422: StatusCode.INVALID_ARGUMENT,
    500: StatusCode.INTERNAL,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
Context = grpc.aio.ServicerContext
_Method = Callable[[Context, Visit], Awaitable[bytes]]


class GrpcServer:
    """Answers calls from `start` until `stop`."""

    def __init__(
        self, address: str, app: FastAPI, handler: RequestHandler, batcher: Batcher, limits: Limits, access: Access
    ) -> None:
        self._address, self._app, self._handler = address, app, handler  # `host:port`
        self._batcher, self._limits, self._access = batcher, limits, access
        self._intake = Intake(limits)
        self._under_way: set[asyncio.Task[Any]] = set()
        self._is_given_up = False
        self._ends_at = 0.0  # by the clock; 0 until the server stops
        self.port = 0

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """By method. Each has the address that does the same over HTTP, which says whether a key is needed."""
        methods: dict[str, tuple[str, _Method]] = {
            "ServerLive": ("/v2/health/live", partial(self._tell, lambda _: {"live": True})),
            "ServerReady": ("/v2/health/ready", partial(self._tell, lambda _: {"ready": self._is_ready()})),
            "ServerMetadata": ("/v2", partial(self._tell, self._server_metadata)),
            "ModelReady": ("/v2/models", partial(self._tell, self._model_ready)),
            "ModelMetadata": ("/v2/models", partial(self._tell, self._model_metadata)),
            "ModelInfer": ("/v2/models", self._infer),
        }
        return {
            name: grpc.stream_unary_rpc_method_handler(partial(self._handle, f"/{SERVICE}/{name}", address, method))
            for name, (address, method) in methods.items()
        }

    async def start(self) -> None:
        """Begin to take calls."""
        self._loop = asyncio.get_running_loop()
        handlers = grpc.method_handlers_generic_handler(SERVICE, self._handlers())
        self._server = grpc.aio.server(handlers=[handlers], options=_options(self._limits))
        self.port = self._server.add_insecure_port(self._address)
        await self._server.start()

    def begin_stop(self) -> None:
        """Refuse new calls. May be called by a signal handler."""
        self._ends_at = self._ends_at or monotonic() + self._limits.drain_s

    async def stop(self) -> None:
        """Let the calls under way finish; at the end of the drain's time, refuse them. Then stop gRPC itself.

        A call that arrives at that moment ends as CANCELLED, which no client repeats. Clients that were refused before
        and wait as long as they were told are not affected.
        """
        self.begin_stop()
        await asyncio.sleep(min(_SETTLE_S, self._limits.drain_s))
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=max(0.0, self._ends_at - monotonic()))
        self._is_given_up = True
        for task in self._under_way:
            task.cancel()
        await self._server.stop(_LAST_WORDS_S)

    async def _handle(self, path: str, address: str, method: _Method, stream: Any, context: Context) -> bytes:
        """One call, from its metadata to its answer or refusal."""
        metadata = context.invocation_metadata() or ()
        headers = {key.encode(): value if isinstance(value, bytes) else value.encode() for key, value in metadata}
        visit = Visit({"method": "POST", "path": path, "client": (_host(context.peer()), 0)}, headers)
        self._under_way.add(task := cast(asyncio.Task[Any], asyncio.current_task()))
        try:
            if self._ends_at:
                raise _stopping()
            self._access.check(address, headers)
            answer = await method(context, visit)
            visit.status = 200
            context.set_trailing_metadata(_metadata(visit))
            return answer
        except Exception as error:
            if not isinstance(error, Problem):
                _log.exception("call %s failed", visit.id.decode())
                error = Problem(problems.INTERNAL, "the server failed; see its log")
            problem = error.with_traceback(None)
            visit.status = problem.kind.status
        except asyncio.CancelledError:
            visit.status = problems.DEADLINE.status if context.time_remaining() == 0 else NO_CLIENT
            if not self._is_given_up:  # the client has gone or given up
                raise
            problem = _stopping()
        finally:
            self._under_way.discard(task)
            self._handler.finish(visit)
        await _refuse(context, visit, problem)
        raise AssertionError("a refused call has ended")

    async def _receive(self, context: Context, visit: Visit, deadline: float) -> bytes:
        message = await self._intake.receive(context.read, deadline)
        if not isinstance(message, bytes):  # gRPC drops one that is longer, and says so to the client itself
            detail = f"no message came, or one of more than {self._limits.max_body_bytes:,} bytes"
            raise Problem(problems.TOO_LARGE, detail)
        self._handler.hold(visit, len(message))
        return message

    def _deadline(self, context: Context) -> float:
        left_s = context.time_remaining()
        return self._loop.time() + min(self._limits.deadline_s, math.inf if left_s is None else left_s)

    # The methods

    async def _infer(self, context: Context, visit: Visit) -> bytes:
        self._batcher.check_room(1)  # before the message is received
        model, deadline = self._batcher.served.model, self._deadline(context)
        message = await self._receive(context, visit, deadline)
        inference = await parse_body(read_inference, message, model, self._limits)
        del message
        refuse_other_size(inference, self._batcher.served.model)
        never = self._loop.create_future  # gRPC cancels the task when its client has gone
        job = await self._batcher.classify(inference.images, top_k=1, deadline=deadline, receive=never)
        visit.take(job)
        return write_inference(inference, job.logits, job.served.model)

    async def _tell(self, answer: Callable[[Any], Mapping[str, Any]], context: Context, visit: Visit) -> bytes:
        """A method that answers from what is known."""
        name = visit.path.rpartition("/")[2]
        message = await self._receive(context, visit, self._deadline(context))
        fields = answer(parse(message, getattr(pb, f"{name}Request")))
        return getattr(pb, f"{name}Response")(**fields).SerializeToString()

    def _server_metadata(self, request: Any) -> Mapping[str, Any]:
        return {"name": self._app.title, "version": self._app.version, "extensions": ["classification"]}

    def _model_ready(self, request: Any) -> Mapping[str, Any]:
        is_served = (request.name, request.version or VERSION) == (model_name(self._batcher.served.model), VERSION)
        return {"ready": is_served and self._is_ready()}

    def _model_metadata(self, request: Any) -> Mapping[str, Any]:
        refuse_unknown(request.name, request.version or VERSION, self._batcher.served.model)
        return model_metadata(self._batcher)

    def _is_ready(self) -> bool:
        try:
            self._batcher.check_ready()
        except Problem:
            return False
        return True


class Intake:
    """Bounds the messages that are received at once: gRPC shows only complete ones, so each may be the longest.

    There are places for as many of the longest as may be held. A call without one waits, unread.
    """

    patience_s = 1.0  # for a message while others wait

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.max_held_bytes // limits.max_body_bytes)
        self._started: dict[asyncio.Timeout, float] = {}  # for each call with a place, the time when it got it
        self._num_waiting = 0

    async def receive(self, read: Callable[[], Awaitable[Any]], deadline: float) -> Any:
        """Awaits `read` until the loop's time `deadline`, or for `patience_s` if others wait for the place."""
        await self._take_place(deadline)
        timeout = asyncio.timeout_at(deadline)
        self._started[timeout] = asyncio.get_running_loop().time()
        try:
            async with timeout:
                if self._num_waiting:
                    self._hurry()
                return await read()
        except TimeoutError:
            if timeout.when() == deadline:  # no other call waited
                raise Problem(problems.TIMEOUT, "the message was not complete within its deadline; send less") from None
            detail = f"the message was not complete within {self.patience_s:g} s while others waited; retry in 1 s"
            raise Problem(problems.OVERLOADED, detail, RETRY) from None
        finally:
            del self._started[timeout]
            self._places.release()

    async def _take_place(self, deadline: float) -> None:
        if self._num_waiting >= self._limits.max_queue:
            raise Problem(problems.OVERLOADED, f"{self._num_waiting} messages wait to be received; retry in 1 s", RETRY)
        self._num_waiting += 1
        if self._places.locked():
            self._hurry()
        try:
            async with asyncio.timeout_at(deadline):
                await self._places.acquire()
        except TimeoutError:
            raise Problem(problems.DEADLINE, "other messages were received until the deadline; retry later") from None
        finally:
            self._num_waiting -= 1

    def _hurry(self) -> None:
        """Limit every call that has a place to `patience_s`."""
        now = asyncio.get_running_loop().time()
        for timeout, start in self._started.items():
            until = max(now, start + self.patience_s)
            if not timeout.expired() and timeout.when() > until:  # type: ignore[operator]
                timeout.reschedule(until)


def _options(limits: Limits) -> list[tuple[str, int]]:
    """Bounds for clients that send much, slowly, or not at all."""
    return [
        ("grpc.so_reuseport", 1),  # between workers; `reserved` in serve/run.py keeps the port from other servers
        ("grpc.max_receive_message_length", limits.max_body_bytes),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: 20 MB may be 20 GB of zeros
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.max_queue),
        ("grpc.http2.bdp_probe", 0),  # it would read more of each message than is asked for
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 300_000),
        ("grpc.keepalive_time_ms", 30_000),  # a client that has gone silently
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def _stopping() -> Problem:
    return Problem(problems.NOT_READY, "the server is stopping; try another one", RETRY)


async def _refuse(context: Context, visit: Visit, problem: Problem) -> None:
    wait_s = problem.headers.get("Retry-After")
    metadata = [*_metadata(visit), ("problem-type", problem.kind.type)]
    if wait_s:  # the first is for clients with a retry policy, the second for people
        metadata += [("grpc-retry-pushback-ms", f"{1000 * int(wait_s)}"), ("retry-after", wait_s)]
    detail = problem.detail.encode(errors="replace")[:_DETAIL_BYTES].decode(errors="ignore")
    await context.abort(STATUS_OF_HTTP[problem.kind.status], detail, tuple(metadata))


def _metadata(visit: Visit) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", visit.id.decode()), ("server-timing", visit.server_timing().decode()))


def _host(peer: str) -> str:
    """The address in `ipv4:127.0.0.1:1234` or `ipv6:%5B::1%5D:1234`."""
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")
