"""The Open Inference Protocol over gRPC, on the event loop of HTTP, with the same limits, key, queue and model.

Every method is registered as one that takes a stream, which is the same on the wire: a call without the key, or one
that would be refused anyway, is answered before its message is received.
"""

import asyncio
import logging
import math
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C library writes to stderr, and not in JSON

import grpc
from fastapi import FastAPI
from grpc import StatusCode
from starlette.types import Message

from serve.request import problems
from serve.request.access import Access
from serve.request.batcher import Batcher
from serve.request.body import parse as parse_in_turn
from serve.request.limits import Limits
from serve.request.predict import RequestHandler, Visit
from serve.request.problems import Problem
from serve.v2.routes import VERSION, describe, model_name, refuse_other_size, refuse_unknown, refuse_unready
from serve.v2.rpc.intake import Intake
from serve.v2.rpc.messages import parse, pb, read_inference, write_inference
from serve.v2.rpc.port import RpcAddress

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_EXTENSIONS = ["classification"]
_SETTLE_S = 0.3  # for clients to learn that the server stops
_LAST_WORDS_S = 1.0  # for calls that are refused at the end of a drain
_DETAIL_BYTES = 1500  # of a refusal: clients take 8 KB of metadata, where a byte that is not ASCII takes three
_OK, _NOBODY = 200, 499  # in the log and in /metrics, as over HTTP
_log = logging.getLogger(__name__)
STATUS_OF = {
    problems.BAD_REQUEST: StatusCode.INVALID_ARGUMENT,
    problems.UNAUTHORIZED: StatusCode.UNAUTHENTICATED,
    problems.NOT_FOUND: StatusCode.NOT_FOUND,
    problems.TIMEOUT: StatusCode.DEADLINE_EXCEEDED,
    problems.TOO_LARGE: StatusCode.RESOURCE_EXHAUSTED,
    problems.TOO_MANY_IMAGES: StatusCode.RESOURCE_EXHAUSTED,
    problems.TOO_MANY_PIXELS: StatusCode.RESOURCE_EXHAUSTED,
    problems.UNDECODABLE: StatusCode.INVALID_ARGUMENT,
    problems.INTERNAL: StatusCode.INTERNAL,
    problems.NOT_A_NUMBER: StatusCode.INTERNAL,
    problems.NOT_READY: StatusCode.UNAVAILABLE,
    problems.OVERLOADED: StatusCode.UNAVAILABLE,
    problems.DEADLINE: StatusCode.DEADLINE_EXCEEDED,
}
Context = grpc.aio.ServicerContext


class _Call(NamedTuple):
    """One call: its visit, its deadline as the loop's time, and a function that receives its message."""

    visit: Visit
    deadline: float
    receive: Callable[[], Awaitable[bytes]]


_Method = Callable[[_Call], Awaitable[bytes]]


class RpcServer(grpc.GenericRpcHandler):
    """Answers calls from `start` until `stop`."""

    def __init__(self, app: FastAPI, handler: RequestHandler, batcher: Batcher, limits: Limits, access: Access) -> None:
        self._app, self._handler, self._batcher, self._limits, self._access = app, handler, batcher, limits, access
        self._intake = Intake(limits)
        self._under_way: set[asyncio.Task[Any]] = set()
        self._is_given_up = False
        self._drain: asyncio.Task[None] | None = None
        self.port = 0
        methods = {  # each with the address that does the same over HTTP, which says whether a key is needed
            "ServerLive": (self._server_live, "/v2/health/live"),
            "ServerReady": (self._server_ready, "/v2/health/ready"),
            "ModelReady": (self._model_ready, "/v2/models"),
            "ServerMetadata": (self._server_metadata, "/v2"),
            "ModelMetadata": (self._model_metadata, "/v2/models"),
            "ModelInfer": (self._model_infer, "/v2/models"),
        }
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}
        for name, (answer, address) in methods.items():
            path = f"/{SERVICE}/{name}"
            handle = partial(self._handle, path, answer, address)
            self._handlers[path] = grpc.stream_unary_rpc_method_handler(handle)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a method; for None, gRPC answers UNIMPLEMENTED."""
        return self._handlers.get(handler_call_details.method)

    async def start(self, address: RpcAddress) -> None:
        """Begin to take calls."""
        self._loop, self._drain_s = asyncio.get_running_loop(), address.drain_s
        self._server = grpc.aio.server(handlers=(self,), options=_options(self._limits))
        self.port = self._server.add_insecure_port(str(address))
        await self._server.start()

    def begin_stop(self) -> None:
        """Take no more calls, and let those under way finish. May be called by a signal handler."""
        self._loop.call_soon_threadsafe(self._begin_drain)

    async def stop(self) -> None:
        """Wait for the calls under way; after the drain's time, refuse them."""
        await self._begin_drain()

    def _begin_drain(self) -> "asyncio.Task[None]":
        self._drain = self._drain or self._loop.create_task(self._finish())
        return self._drain

    async def _finish(self) -> None:
        """Wait for the calls under way while new ones are refused, then stop gRPC itself.

        A call that arrives at that moment ends as CANCELLED, which no client repeats. Clients that were refused before
        and wait as long as they were told are not affected.
        """
        until = self._loop.time() + self._drain_s
        await asyncio.sleep(min(_SETTLE_S, self._drain_s))
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=until - self._loop.time())
        self._is_given_up = True
        for task in self._under_way:
            task.cancel()
        await self._server.stop(_LAST_WORDS_S)

    async def _handle(self, path: str, method: _Method, address: str, stream: Any, context: Context) -> bytes:
        """One call, from its metadata to its answer or refusal."""
        headers = {key.encode(): _bytes(value) for key, value in context.invocation_metadata() or ()}
        visit = Visit({"method": "POST", "path": path, "client": (_host(context.peer()), 0)}, headers)
        task = asyncio.current_task()
        assert task
        self._under_way.add(task)
        try:
            if self._drain:
                raise _stopping()
            self._access.check(address, headers)
            answer = await method(self._call(visit, context))
            visit.status = _OK
            context.set_trailing_metadata(_metadata(visit))
            return answer
        except Exception as error:
            problem = self._problem_of(error, visit)
        except asyncio.CancelledError:
            visit.status = problems.DEADLINE.status if context.time_remaining() == 0 else _NOBODY
            if not self._is_given_up:  # the client has gone or given up
                raise
            problem = _stopping()
        finally:
            self._under_way.discard(task)
            self._handler.finish(visit)
        await _refuse(context, visit, problem)
        raise AssertionError("a refused call has ended")

    def _problem_of(self, error: Exception, visit: Visit) -> Problem:
        if not isinstance(error, Problem):
            _log.error("call %s failed", visit.id.decode(), exc_info=error)
            error = Problem(problems.INTERNAL, "the server failed; its log says why")
        visit.status = error.kind.status
        return error.with_traceback(None)

    def _call(self, visit: Visit, context: Context) -> _Call:
        left_s = context.time_remaining()
        deadline = self._loop.time() + min(self._limits.deadline_s, math.inf if left_s is None else left_s)

        async def receive() -> bytes:
            message = await self._intake.receive(context.read, deadline)
            if not isinstance(message, bytes):  # gRPC drops one that is longer, and says so to the client itself
                most = f"{self._limits.max_body_bytes:,}"
                raise Problem(problems.TOO_LARGE, f"no message came, or one of more than {most} bytes")
            self._handler.hold(visit, len(message))
            return message

        return _Call(visit, deadline, receive)

    # The methods

    async def _server_live(self, call: _Call) -> bytes:
        parse(await call.receive(), pb.ServerLiveRequest)
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def _server_ready(self, call: _Call) -> bytes:
        parse(await call.receive(), pb.ServerReadyRequest)
        return pb.ServerReadyResponse(ready=self._is_ready()).SerializeToString()

    async def _model_ready(self, call: _Call) -> bytes:
        request = parse(await call.receive(), pb.ModelReadyRequest)
        is_served = (request.name, request.version or VERSION) == (model_name(self._batcher.served.model), VERSION)
        return pb.ModelReadyResponse(ready=is_served and self._is_ready()).SerializeToString()

    async def _server_metadata(self, call: _Call) -> bytes:
        parse(await call.receive(), pb.ServerMetadataRequest)
        name, version = self._app.title, self._app.version
        return pb.ServerMetadataResponse(name=name, version=version, extensions=_EXTENSIONS).SerializeToString()

    async def _model_metadata(self, call: _Call) -> bytes:
        request = parse(await call.receive(), pb.ModelMetadataRequest)
        refuse_unknown(request.name, request.version or VERSION, self._batcher.served.model)
        return pb.ModelMetadataResponse(**describe(self._batcher)).SerializeToString()

    async def _model_infer(self, call: _Call) -> bytes:
        self._batcher.check_room(1)  # before the message is received
        model = self._batcher.served.model
        message = await call.receive()
        inference = await parse_in_turn(self._batcher.turn, read_inference, message, model, self._limits)
        del message
        refuse_other_size(inference, self._batcher.served.model)
        job = await self._batcher.classify(inference.images, top_k=1, deadline=call.deadline, receive=_no_news)
        call.visit.take(job)
        return write_inference(inference, job.logits, job.served.model)

    def _is_ready(self) -> bool:
        try:
            refuse_unready(self._app.state.is_ready, self._batcher)
        except Problem:
            return False
        return True


def _options(limits: Limits) -> list[tuple[str, int]]:
    """Bounds for clients that send much, slowly, or not at all."""
    return [
        ("grpc.so_reuseport", 1),  # between workers; serve/v2/rpc/port.py keeps the port from other servers
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
    return Problem(problems.NOT_READY, "the server is stopping; ask another one", {"Retry-After": "1"})


async def _refuse(context: Context, visit: Visit, problem: Problem) -> None:
    wait_s = problem.headers.get("Retry-After")
    metadata = [*_metadata(visit), ("problem-type", problem.kind.type)]
    if wait_s:
        # The first is for clients with a retry policy, the second for people.
        metadata += [("grpc-retry-pushback-ms", f"{1000 * int(wait_s)}"), ("retry-after", wait_s)]
    detail = problem.detail.encode(errors="replace")[:_DETAIL_BYTES].decode(errors="ignore")
    await context.abort(STATUS_OF[problem.kind], detail, tuple(metadata))


def _metadata(visit: Visit) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", visit.id.decode()), ("server-timing", visit.server_timing().decode()))


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin-1", errors="replace")


def _host(peer: str) -> str:
    """The address in `ipv4:127.0.0.1:1234` or `ipv6:%5B::1%5D:1234`."""
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")


async def _no_news() -> Message:
    """Never returns: gRPC cancels the task when its client has gone."""
    return await asyncio.get_running_loop().create_future()
