"""Requests to a server on this machine from one thread: as fast as replies come, or at a rate that never waits."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import numpy as np

HOST = "127.0.0.1"
TICK_S, PATIENCE_S = 0.001, 30.0
LOST = 0  # in place of a status: the connection ended before the reply
MakeRequest = Callable[[int], bytes]  # the bytes of the n-th request


class Reply(NamedTuple):
    """The outcome of the n-th request; `seconds` count from when it was due, so that waiting shows."""

    number: int
    status: int
    head: bytes
    body: bytes
    seconds: float


def predict_request(image: bytes) -> MakeRequest:
    """POST /predict with `image`; the n-th request names itself "load-n" in the server's log."""
    lines = ("POST /predict HTTP/1.1", "Host: a", "Content-Type: image/png", f"Content-Length: {len(image)}")
    head = "\r\n".join((*lines, "X-Request-Id: load-%d", "", "")).encode()
    return lambda number: head % number + image


def named(statuses: Counter[int]) -> dict[str, int]:
    """How many replies had each status, as records have it: in order, and "lost" where there was no reply."""
    return {str(status) if status else "lost": count for status, count in sorted(statuses.items())}


class Tally:
    """Takes replies: how many of each status, and how long they took."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self.replies: list[tuple[int, float, float]] = []  # status, seconds, and when
        self.num_without_retry_after = 0

    def __call__(self, reply: Reply) -> None:
        self.replies.append((reply.status, reply.seconds, self._clock()))
        self.num_without_retry_after += reply.status == 503 and b"\r\nretry-after: " not in reply.head

    def statuses(self) -> dict[str, int]:
        return named(Counter(status for status, _, _ in self.replies))

    def rate(self, start: float, seconds: float) -> float:
        """Replies 200 a second that came within `seconds` of `start`."""
        return sum(status == 200 and when - start <= seconds for status, _, when in self.replies) / seconds

    def percentile_ms(self, status: int, percent: float) -> float:
        return 1000 * float(np.percentile([taken for found, taken, _ in self.replies if found == status], percent))


class Load:
    """Connections that are kept open, each with one request at a time; a lost one is reopened where possible.

    A load ends with a grace period of `PATIENCE_S` for replies under way; those that miss it are lost.
    """

    def __init__(
        self, port: int, make_request: MakeRequest, take: Callable[[Reply], object], *, num_connections: int
    ) -> None:
        self._port, self._make_request, self.take = port, make_request, take
        self._num_connections = num_connections
        self._loop = asyncio.get_running_loop()
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._quiet = asyncio.Event()  # over, and no reply is under way
        self._send_next: Callable[[_Connection], None] = self._idle.append
        self.start = 0.0  # the loop's time when all connections were open
        self.num_sent = 0
        self.num_refused = 0  # connections that the server did not take

    async def saturate(self, seconds: float) -> None:
        """Every connection sends its next request as soon as it has a reply."""
        self._send_next = lambda connection: self._send(connection, self._loop.time())
        await self._connect_all()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)
        await self._end()

    async def offer(self, rate: float, seconds: float) -> int:
        """Send `rate` requests a second, whatever becomes of them; returns how many were due.

        Those due while every connection waits for a reply go out as soon as one has it.
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
        """Send nothing more; the load ends when every request under way has its reply."""
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
                await asyncio.wait_for(self._quiet.wait(), PATIENCE_S)
            except TimeoutError:
                for connection in tuple(self._busy):
                    connection.transport.abort()
        for connection in tuple(self._idle):
            connection.transport.abort()
        await asyncio.gather(*self._tasks)

    def _send(self, connection: "_Connection", due: float) -> None:
        number = self.num_sent
        self.num_sent += 1
        self._busy.add(connection)
        connection.send(self._make_request(number), number, due)

    def is_free(self, connection: "_Connection") -> None:
        """Give an opened or answered connection its next request."""
        self._busy.discard(connection)
        if self._over.is_set():
            connection.transport.abort()
        elif not connection.transport.is_closing():
            self._send_next(connection)
        self._check_quiet()

    def is_closed(self, connection: "_Connection") -> None:
        """Open another connection in its place."""
        self._busy.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._check_quiet()
        if not self._over.is_set():
            task = self._loop.create_task(self._connect())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _check_quiet(self) -> None:
        if self._over.is_set() and not self._busy:
            self._quiet.set()


@asynccontextmanager
async def saturated(
    port: int, image: bytes, take: Callable[[Reply], object], *, num_connections: int
) -> AsyncIterator[Load]:
    """A load on POST /predict that asks without a pause meanwhile; it ends with its last reply."""
    load = Load(port, predict_request(image), take, num_connections=num_connections)
    task = asyncio.create_task(load.saturate(3600))
    try:
        yield load
    finally:
        load.stop()
        await task


class _Connection(asyncio.Protocol):
    """One request at a time; its reply is read whole."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._clock = asyncio.get_running_loop().time
        self._received = b""
        self._number: int | None = None  # of the request under way
        self._due = 0.0

    def send(self, request: bytes, number: int, due: float) -> None:
        self._number, self._due = number, due
        self.transport.write(request)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self._load.is_free(self)

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
            self.transport.close()
        self._take(int(head[9:12]), head, body)
        self._load.is_free(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._number is not None:
            self._take(LOST, b"", b"")
        self._load.is_closed(self)

    def _take(self, status: int, head: bytes, body: bytes) -> None:
        assert self._number is not None
        number, self._number = self._number, None
        self._load.take(Reply(number, status, head, body, self._clock() - self._due))
