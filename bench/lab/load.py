"""Requests to a server on this machine, as fast as replies come or at a rate that never waits; and those of wrk."""

import asyncio
import itertools
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from common.refusal import Refusal

HOST = "127.0.0.1"
TICK_S, PATIENCE_S = 0.001, 30.0
WRK_SCRIPT, WRK_CORE = Path(__file__).with_name("wrk.lua"), "1"  # the servers have core 0
LOST = 0  # in place of a status: the connection ended before the reply
MakeRequest = Callable[[int], bytes]  # the bytes of the n-th request


class Reply(NamedTuple):
    """The outcome of the n-th request; `seconds` count from when it was due, so that waiting shows."""

    number: int
    status: int
    seconds: float
    at: float  # the loop's time
    head: bytes = b""
    body: bytes = b""


def predict_request(image: bytes) -> MakeRequest:
    """POST /predict with `image`; the n-th request names itself "load-n" in the server's log."""
    lines = ("POST /predict HTTP/1.1", "Host: a", "Content-Type: image/png", f"Content-Length: {len(image)}")
    head = "\r\n".join((*lines, "X-Request-Id: load-%d", "", "")).encode()
    return lambda number: head % number + image


def get_request(path: str) -> MakeRequest:
    return lambda number: f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


class Load:
    """Connections that are kept open, each with one request at a time; a lost one is opened again where possible.

    A connection sends its next request as soon as it has a reply and a request is due. With a `rate`, as many requests
    fall due every second, whether or not earlier ones are answered; without one, a request is always due. `take` is
    called with every reply. A load ends with a grace period of `PATIENCE_S` for pending replies; later ones are lost.
    """

    def __init__(
        self,
        port: int,
        make_request: MakeRequest,
        take: Callable[[Reply], object] = lambda reply: None,
        *,
        num_connections: int,
        rate: float | None = None,
    ) -> None:
        self._port, self._make_request, self._take = port, make_request, take
        self._num_connections, self._rate = num_connections, rate
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._numbers = itertools.count()
        self.start = 0.0  # the loop's time when all connections were open
        self.num_sent = 0
        self.replies: list[Reply] = []  # without their heads and bodies

    async def run(self, seconds: float) -> None:
        connections = await asyncio.gather(*(self._connect() for _ in range(self._num_connections)))
        self.start = self._loop.time()
        asking = asyncio.gather(*map(self._ask_through, connections))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)
        self.stop()
        with suppress(TimeoutError):
            await asyncio.wait_for(asking, PATIENCE_S)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """`run` from the first reply until the context ends."""
        task = asyncio.create_task(self.run(3600))
        try:
            while not self.replies and not task.done():
                await asyncio.sleep(TICK_S)
            yield
        finally:
            self.stop()
            await task

    def stop(self) -> None:
        """Send nothing more; the load ends when every request under way has its reply."""
        self._over.set()

    def statuses(self) -> dict[str, int]:
        """How many replies had each status, in order; "lost" where there was no reply."""
        found = Counter(reply.status for reply in self.replies)
        return {str(status) if status else "lost": count for status, count in sorted(found.items())}

    def rate(self, seconds: float) -> float:
        """Replies 200 a second that came within `seconds` of the start."""
        return sum(one.status == 200 and one.at - self.start <= seconds for one in self.replies) / seconds

    def percentile_ms(self, status: int, percent: float) -> float:
        import numpy as np

        return 1000 * float(np.percentile([one.seconds for one in self.replies if one.status == status], percent))

    async def _connect(self) -> "_Connection | None":
        with suppress(OSError):  # the server has ended
            return (await self._loop.create_connection(_Connection, HOST, self._port))[1]

    async def _ask_through(self, connection: "_Connection | None") -> None:
        """One request after another, each on `connection` or, where that is lost, on a new one."""
        for number in self._numbers:  # of all connections
            now = self._loop.time()
            due = self.start + number / self._rate if self._rate else now
            if due > now:
                await asyncio.sleep(due - now)
            if connection and connection.transport.is_closing():
                connection = await self._connect()
            if not connection or self._over.is_set():
                break
            self.num_sent += 1
            status, head, body = LOST, b"", b""
            try:
                status, head, body = await connection.ask(self._make_request(number))
            finally:  # or it has not come in time
                now = self._loop.time()
                self.replies.append(Reply(number, status, now - due, now))
                self._take(Reply(number, status, now - due, now, head, body))
                if status == LOST:
                    connection.transport.abort()
        if connection:
            connection.transport.abort()


class _Connection(asyncio.Protocol):
    """One request at a time; its reply is read whole."""

    _reply: asyncio.Future[tuple[int, bytes, bytes]] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """Status, head in lower case and body of the reply; the status is `LOST` if the connection ends before it."""
        self._received, self._reply = b"", asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._reply

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        head = head.lower() + b"\r\n"
        if not end or len(body) < int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]):
            return
        if b"\r\nconnection: close\r\n" in head:
            self.transport.close()
        self._finish(int(head[9:12]), head, body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(LOST, b"", b"")

    def _finish(self, *reply: Any) -> None:
        if self._reply and not self._reply.done():
            self._reply.set_result(reply)


@asynccontextmanager
async def sampled(read: Callable[[], int], *, every_s: float) -> AsyncIterator[list[int]]:
    """The value of `read` at the start, and its values at intervals until the context ends."""
    found = [read()]

    async def sample() -> None:
        while True:
            found.append(read())
            await asyncio.sleep(every_s)

    task = asyncio.create_task(sample())
    try:
        yield found
    finally:
        task.cancel()


# wrk as the client: each of its connections sends the next request as soon as it is answered


def refuse_without_tools() -> None:
    """Both are Debian packages; no Python package provides them."""
    if missing := [name for name in ("wrk", "taskset") if not shutil.which(name)]:
        raise Refusal(f"{' and '.join(missing)} missing: install the Debian packages wrk and util-linux")


def put_load(
    url: str, path: str, media_type: str, bodies: list[Path], *, num_connections: int, seconds: float
) -> dict[str, float]:
    """Post the files `bodies` in turn for about `seconds`; wrk counts whole ones.

    Returns `requests_per_s`, `p50_ms`, p75, p90, p95, p99 and `p99_9_ms`, and the number of `failures`: statuses above
    399, broken connections and timeouts.
    """
    argv = ["taskset", "-c", WRK_CORE, "wrk", "--threads", "1", "--connections", str(num_connections)]
    argv += ["--duration", f"{max(1, round(seconds))}s", "--timeout", "10s", "--script", str(WRK_SCRIPT), url]
    done = subprocess.run([*argv, "--", media_type, path, *map(str, bodies)], capture_output=True, text=True)
    if done.returncode:
        raise Refusal(f"wrk failed: {(done.stderr or done.stdout).strip()[-200:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return {"requests_per_s": result.pop("requests") / result.pop("seconds"), **result}
