"""One HTTP connection: clients can be neither slow nor endless, and invalid HTTP is answered by a problem document."""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import Literal

import httptools

from serve.request.limits import SPARE_FILES
from serve.request.one_write import OneWrite
from serve.request.predict import REFUSAL
from serve.request.problems import BAD_REQUEST, HEADERS_TOO_LARGE, OVERLOADED, RETRY, Problem
from serve.request.uvicorn_internals import HttpToolsProtocol, RequestResponseCycle

MAX_HEADER_BYTES = 2**16
_HEADER_BYTES = 32  # added for each header or trailer, as in HTTP/2: RFC 9113, 6.5.2
MAX_DROPPED_BYTES = 2**20  # after the last answer of a connection
MAX_PIPELINED = 64  # requests that wait for the answer to the one before
_FRAMING_PER_BODY_BYTE = 8  # allowed for chunks: one of a single byte takes five bytes more
_PROBE_S = 0.25
MAX_TURNED_AWAY = SPARE_FILES // 2  # connections beyond the limit that are told why; any more are cut off
_QUIET_S = 60.0  # between two log lines about a full server
_TOO_LARGE = f"address, headers and trailers are longer than {MAX_HEADER_BYTES:,} bytes"
_TOO_MUCH_FRAMING = (
    f"chunk extensions and trailers are over {MAX_HEADER_BYTES:,} bytes longer than the body; leave them out"
)
_CLOSE = {"Connection": "close"}
_RETRY = {**_CLOSE, **RETRY}
_log = logging.getLogger(__name__)


class Door:
    """The connections of one process."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self.num_open = 0
        self.on_change: Callable[[int], None] = lambda num_open: None
        self.on_refuse: Callable[[], None] = lambda: None
        self._last_line = float("-inf")

    def enter(self) -> int:
        """Count a new connection. Returns how many are beyond the limit, including it."""
        self.num_open += 1
        self.on_change(self.num_open)
        num_beyond = self.num_open - self.max_connections
        if num_beyond > 0:
            self.on_refuse()
            if monotonic() - self._last_line > _QUIET_S:
                self._last_line = monotonic()
                rest = f"the maximum; more are refused, which is logged at most every {_QUIET_S:g} s"
                _log.warning(f"%d connections are open, {rest}", self.max_connections)
        return num_beyond

    def leave(self) -> None:
        """Count a closed connection."""
        self.num_open -= 1
        self.on_change(self.num_open)


class Connection(HttpToolsProtocol):
    """Bounds what uvicorn does not: headers, trailers, chunk extensions, blank lines, pipelining, unread answers.

    A refusal becomes a request with the problem in its scope, so that it has an id, a line in the log and its turn
    behind earlier answers. A body has the deadline of its request (body.py). Between two requests, uvicorn's own limit
    applies.
    """

    headers_s = 10.0  # from the first byte of a connection or request to the end of its headers
    write_s = 30.0  # for a client to read its answer
    _stage: Literal["between", "headers", "body"] = "between"  # of the request that is being read
    _timer: asyncio.TimerHandle | None = None  # for the headers, or for a client that has stopped sending
    _write_timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None  # the request that is being answered; `cycle` was read last
    _num_header_bytes = 0
    _num_body_bytes = 0  # of what is being parsed
    _num_unpaid_bytes = 0  # of framing beyond what the body allows
    _has_begun = False  # a request, in what is being parsed
    _is_deaf = False  # after a refusal nothing more is read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._door: Door = self.app_state["door"]
        num_beyond = self._door.enter()
        if num_beyond > MAX_TURNED_AWAY:
            transport.abort()
        elif num_beyond > 0:
            detail = f"{self._door.max_connections} connections are open already; retry in 1 s"
            self._refuse(Problem(OVERLOADED, detail, _RETRY))
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.leave()
        self._end_timer()
        if self._write_timer:
            self._write_timer.cancel()
        super().connection_lost(exc)
        if self._running:  # uvicorn tells `cycle` alone
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return self._drop(data)
        self._num_body_bytes, self._has_begun = 0, False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(_problem_of(error))
        else:
            if not self._has_begun:
                self._bound_framing(len(data))
            if self._stage == "headers" and not self._timer and not self._is_deaf:
                self._await_headers()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to keep the socket open: a client may stop sending once its request is complete."""
        if self._stage != "between" or self.cycle is None or self.cycle.response_complete:
            return False
        self.cycle.keep_alive = False
        self._timer = self.loop.call_later(_PROBE_S, self._probe)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._stage, self._has_begun = "headers", True
        self._num_header_bytes = self._num_unpaid_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_header_bytes += len(name) + len(value) + _HEADER_BYTES
        if self._num_header_bytes > MAX_HEADER_BYTES:
            raise Problem(HEADERS_TOO_LARGE, _TOO_LARGE, _CLOSE)
        if self._stage != "body":  # trailers are dropped: RFC 9110, 6.5.1
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # to `_ignore_upgrade`
        self._check_headers()
        super().on_headers_complete()
        if len(self.pipeline) == 1:  # uvicorn would read no more, and not notice that the client goes
            self.flow.resume_reading()
        if not self.parser.should_keep_alive():  # uvicorn 0.51 looks only when it writes the answer itself
            self.cycle.keep_alive = False
        self._stage = "body"
        self._end_timer()

    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._stage = "between"

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._stage == "headers":  # of the next request, which have their own limit
            self._unset_keepalive_if_required()
        if self.cycle.response_complete and not self.cycle.keep_alive:
            self._is_deaf = True
        if self.transport.get_write_buffer_size():
            self._await_reader()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Callable[..., object]) -> None:
        self._running = cycle
        cycle.send = OneWrite(cycle)  # type: ignore[method-assign]
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    # Refusals

    def _check_headers(self) -> None:
        if self._num_header_bytes + len(self.url) > MAX_HEADER_BYTES:
            raise Problem(HEADERS_TOO_LARGE, _TOO_LARGE, _CLOSE)
        num_hosts = [name for name, _ in self.headers].count(b"host")
        if num_hosts > 1 or (not num_hosts and self.parser.get_http_version() != "1.0"):
            raise Problem(BAD_REQUEST, f"a request has one Host header, got {num_hosts}", _CLOSE)
        if len(self.pipeline) >= MAX_PIPELINED:
            detail = f"{MAX_PIPELINED} requests of this connection wait for their answers; read those first"
            raise Problem(OVERLOADED, detail, _RETRY)

    def _bound_framing(self, num_bytes: int) -> None:
        """Count bytes that are not of a body."""
        framing = num_bytes - self._num_body_bytes
        paid = _FRAMING_PER_BODY_BYTE * self._num_body_bytes
        self._num_unpaid_bytes = max(0, self._num_unpaid_bytes + framing - paid)
        if self._num_unpaid_bytes <= MAX_HEADER_BYTES:
            return
        match self._stage:
            case "between":  # blank lines
                self.transport.close()
            case "headers":
                self._refuse(Problem(HEADERS_TOO_LARGE, _TOO_LARGE, _CLOSE))
            case "body":
                self._refuse(Problem(BAD_REQUEST, _TOO_MUCH_FRAMING, _CLOSE))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse the request again without its Upgrade header: the parser would drop its body."""
        kept = [field for field in self.headers if field[0] != b"upgrade"]
        if len(kept) == len(self.headers):
            return self._refuse(Problem(BAD_REQUEST, "CONNECT asks for a proxy; this server is not one", _CLOSE))
        first = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        head = first + b"".join(b"%b: %b\r\n" % field for field in kept)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.data_received(head + b"\r\n" + rest)

    def _refuse(self, problem: Problem) -> None:
        """Answer with `problem` after the answers before it, and read no more."""
        stage, self._stage, self._is_deaf = self._stage, "between", True
        self._end_timer()
        if stage == "body":  # which ends its request
            if self.cycle.response_complete:
                return self.transport.close()
            self.cycle.scope[REFUSAL] = problem  # type: ignore[typeddict-unknown-key]
            return self.cycle.message_event.set()
        self._unset_keepalive_if_required()
        url = self.url if stage == "headers" else b""
        method = self.parser.get_method().decode() if url else "?"
        super().on_message_begin()
        self.url, was_paused = b"/", self.flow.read_paused  # an address that uvicorn can parse
        super().on_headers_complete()
        if not was_paused:
            self.flow.resume_reading()  # even if other answers come first: their client may go
        self.cycle.keep_alive = False
        scope = {"http_version": "1.1", "method": method, "path": url.decode("latin-1"), REFUSAL: problem}
        self.scope.update(scope)  # type: ignore[typeddict-item]

    def _drop(self, data: bytes) -> None:
        """Let the client finish sending: closing the socket earlier would take the refusal back with a reset."""
        self._num_unpaid_bytes += len(data)
        if self._num_unpaid_bytes > MAX_DROPPED_BYTES:
            self.transport.abort()

    # Timers

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(self.headers_s, self.transport.close)

    def _await_reader(self) -> None:
        if not self._write_timer:
            self._write_timer = self.loop.call_later(self.write_s, self._give_up_writing)

    def _give_up_writing(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _probe(self) -> None:
        """Write to a client that stopped sending. If it has gone, a reset comes back and ends the request."""
        running = self._running
        if not running or self.cycle.response_started:
            return
        if not (running.response_started or self.flow.write_paused or running.scope["http_version"] == "1.0"):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._timer = self.loop.call_later(_PROBE_S, self._probe)

    def _end_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


def _problem_of(error: httptools.HttpParserError) -> Problem:
    """The problem that a callback raised, or the parser's own reason."""
    if isinstance(error.__context__, Problem):
        return error.__context__
    reason = "its address is not valid" if isinstance(error, httptools.HttpParserCallbackError) else str(error)
    return Problem(BAD_REQUEST, f"the request is not valid HTTP/1.1: {reason}", _CLOSE)
