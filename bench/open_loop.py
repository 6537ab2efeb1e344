"""Requests to a server on this machine from one thread: as fast as answers come, or at a rate that waits for nobody."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

HOST = "127.0.0.1"
TICK_S = 0.001
LOST = 0  # in place of a status: the connection ended before the answer
MakeRequest = Callable[[int], bytes]  # the bytes of the n-th request


class Answer(NamedTuple):
    """What became of the n-th request; `seconds` are counted from when it was due, so that waiting shows."""

    number: int
    status: int
    head: bytes
    body: bytes
    seconds: float


Take = Callable[[Answer], None]


def predict_request(image: bytes) -> MakeRequest:
    """POST /predict with `image`; the n-th request names itself "load-n" in the server's log."""
    lines = ("POST /predict HTTP/1.1", "Host: a", "Content-Type: image/png", f"Content-Length: {len(image)}")
    head = "\r\n".join((*lines, "X-Request-Id: load-%d", "", "")).encode()
    return lambda number: head % number + image


class Load:
    """Connections that are kept open, each with one request at a time; a lost one is opened again while it can be.

    A load ends with a grace of `patience_s` for answers under way; what has none by then is lost.
    """

    def __init__(
        self, port: int, make_request: MakeRequest, take: Take, *, num_connections: int, patience_s: float = 30.0
    ) -> None:
        self._port, self._make_request, self._take = port, make_request, take
        self._num_connections, self._patience_s = num_connections, patience_s
        self._loop = asyncio.get_running_loop()
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._quiet = asyncio.Event()  # over, and no answer is under way
        self._send_next: Callable[[_Connection], None] = self._idle.append
        self.start = 0.0  # the loop's time when all connections were open
        self.num_sent = 0
        self.num_refused = 0  # connections that the server did not take

    async def saturate(self, seconds: float) -> None:
        """Every connection sends its next request as soon as it has an answer."""
        self._send_next = lambda connection: self._send(connection, self._loop.time())
        await self._connect_all()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)
        await self._end()

    async def offer(self, rate: float, seconds: float) -> int:
        """`rate` requests a second, whatever becomes of them; gives how many were due.

        Those due while every connection waits for an answer go out as soon as one has it.
        """
        await self._connect_all()
        due = 0
        while not self._over.is_set() and (passed := self._loop.time() - self.start) < seconds:
            due = int(passed * rate)
            while self.num_sent < due and self._idle:
                self._send(self._idle.pop(), self.start + self.num_sent / rate)
            await asyncio.sleep(TICK_S)
        await self._end()
        return due

    def stop(self) -> None:
        """Send nothing more; the load ends when what is under way has its answer."""
        self._over.set()

    async def _connect_all(self) -> None:
        await asyncio.gather(*(self._connect() for _ in range(self._num_connections)))
        self.start = self._loop.time()

    async def _connect(self) -> None:
        try:
            await self._loop.create_connection(lambda: _Connection(self), HOST, self._port)
        except OSError:
            self.num_refused += 1

    async def _end(self) -> None:
        self._over.set()
        if self._busy:
            try:
                await asyncio.wait_for(self._quiet.wait(), self._patience_s)
            except TimeoutError:
                for connection in tuple(self._busy):
                    connection.abort()
        for connection in tuple(self._idle):
            connection.abort()
        await asyncio.gather(*self._tasks)

    def _send(self, connection: "_Connection", due: float) -> None:
        number = self.num_sent
        self.num_sent += 1
        self._busy.add(connection)
        connection.send(self._make_request(number), number, due)

    def opened(self, connection: "_Connection") -> None:
        self._go_on(connection)

    def answered(self, connection: "_Connection", answer: Answer) -> None:
        self._busy.discard(connection)
        self._take(answer)
        if not connection.is_closing:
            self._go_on(connection)
        self._check_quiet()

    def closed(self, connection: "_Connection", unanswered: Answer | None) -> None:
        self._busy.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if unanswered:
            self._take(unanswered)
        self._check_quiet()
        if not self._over.is_set():
            task = self._loop.create_task(self._connect())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _go_on(self, connection: "_Connection") -> None:
        if self._over.is_set():
            connection.abort()
        else:
            self._send_next(connection)

    def _check_quiet(self) -> None:
        if self._over.is_set() and not self._busy:
            self._quiet.set()


class _Connection(asyncio.Protocol):
    """One request at a time, and its answer read whole."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._number: int | None = None  # of the request under way
        self._due = 0.0

    @property
    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def send(self, request: bytes, number: int, due: float) -> None:
        self._number, self._due = number, due
        self._transport.write(request)

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._load.opened(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = self._received[:end].lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(self._received) < end + length:
            return
        body, self._received = self._received[end : end + length], self._received[end + length :]
        if b"\r\nconnection: close\r\n" in head:
            self._transport.close()
        self._finish(int(head[9:12]), head, body)

    def connection_lost(self, exc: Exception | None) -> None:
        unanswered = None if self._number is None else self._answer(LOST, b"", b"")
        self._number = None
        self._load.closed(self, unanswered)

    def _finish(self, status: int, head: bytes, body: bytes) -> None:
        answer = self._answer(status, head, body)
        self._number = None
        self._load.answered(self, answer)

    def _answer(self, status: int, head: bytes, body: bytes) -> Answer:
        assert self._number is not None
        return Answer(self._number, status, head, body, self._loop.time() - self._due)
