"""One connection of uvicorn's: nobody is slow or endless with headers on it, and an answer leaves in one write."""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 10.0  # from a connection's or a request's first byte to the end of its headers
MAX_HEADER_BYTES = 2**16


class Connection(HttpToolsProtocol):
    """Closes a connection whose headers take longer than `headers_s` or are longer than MAX_HEADER_BYTES.

    A body has the deadline of its request (serve/wire.py), and a connection between two requests uvicorn's own limit.
    The head and the body of an answer leave in one write, where uvicorn makes two.
    """

    headers_s = HEADERS_S
    _timer: asyncio.TimerHandle | None = None  # while headers are awaited
    _num_header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, Joining(transport, self.loop)))
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_headers()

    def on_headers_complete(self) -> None:
        self._headers_are_there()
        super().on_headers_complete()

    def _await_headers(self) -> None:
        if not self._timer:
            self._num_header_bytes = 0
            self._timer = self.loop.call_later(self.headers_s, self._close_slow)

    def _headers_are_there(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _close_slow(self) -> None:
        self.transport.close()


class Joining:
    """A transport. The first write waits for the second or for the end of this turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""

    def write(self, data: bytes) -> None:
        if self._held:
            data, self._held = self._held + data, b""
            self._transport.write(data)
        else:
            self._held = data
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._held:
            self._transport.write(self._held)
            self._held = b""
