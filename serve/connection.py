"""One connection of uvicorn's: nobody is slow or endless with headers on it, and an answer leaves in one write."""

import asyncio
from collections.abc import Callable

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from serve.hot import BODY_IS_HERE

HEADERS_S = 10.0  # from a connection's or a request's first byte to the end of its headers
MAX_HEADER_BYTES = 2**16


class Connection(HttpToolsProtocol):
    """Closes a connection whose headers take longer than `headers_s` or are longer than MAX_HEADER_BYTES.

    A body has the deadline of its request (serve/wire.py), and a connection between two requests uvicorn's own limit.
    """

    headers_s = HEADERS_S
    _is_in_headers = False
    _timer: asyncio.TimerHandle | None = None  # while headers are awaited
    _num_header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_headers and not self._timer:
            self._await_headers()
        elif self._is_in_headers:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_headers = True

    def on_headers_complete(self) -> None:
        self._headers_are_there()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.scope["extensions"] = {BODY_IS_HERE: {}}  # read before the first `receive`, it saves a timer

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Callable[..., object]) -> None:
        cycle.send = AtOnce(cycle)  # type: ignore[method-assign]
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def _await_headers(self) -> None:
        self._num_header_bytes = 0
        self._timer = self.loop.call_later(self.headers_s, self._close_slow)

    def _headers_are_there(self) -> None:
        self._is_in_headers = False
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _close_slow(self) -> None:
        self.transport.close()


class AtOnce:
    """The `send` of a request: an answer of one known piece leaves in one write; any other goes uvicorn's own way."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._start: Message | None = None  # waits for the body

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        start, self._start = self._start, None
        if start is None:
            await self._send(message)  # type: ignore[arg-type]
        elif not self._answer(start["status"], start["headers"], message):
            await self._send(start)  # type: ignore[arg-type]
            await self._send(message)  # type: ignore[arg-type]

    def _answer(self, status: int, headers: list[tuple[bytes, bytes]], message: Message) -> bool:
        """Write the whole answer, unless it is not whole or needs more than that."""
        cycle, body = self._cycle, message.get("body", b"")
        fields = dict(headers)
        is_plain = (
            fields.get(b"content-length") == b"%d" % len(body)
            and b"connection" not in fields
            and cycle.keep_alive
            and not (message.get("more_body") or cycle.disconnected or cycle.flow.write_paused)
            and cycle.scope["method"] != "HEAD"
        )
        if is_plain:
            lines = [b"%b: %b\r\n" % field for field in (*cycle.default_headers, *headers)]
            head = b"".join(lines)
            if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
                raise ValueError("a header of the answer holds a line break")
            cycle.response_started = cycle.response_complete = True
            cycle.waiting_for_100_continue = False
            cycle.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], head, body))
            cycle.message_event.set()
            cycle.on_response()
        return is_plain
