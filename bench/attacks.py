"""What is written on connections to wear a server out: each attack bounded in bytes and time, and what it cost."""

import http.client
import socket
import threading
import time
from pathlib import Path
from typing import Any

from bench.process import Server

FLOOD_BYTES, FLOOD_S = 200 * 10**6, 8.0  # that an attacker may send
DRIP_S = 12.0  # for the server to end a connection
PAUSE_S = 0.25  # between two drops
MEMORY_MB = 32  # that one attack may add
PROBE_MS = 300  # the longest that a probe may take meanwhile
CONNECTIONS = 200
_CHUNKED = b"Host: a\r\nTransfer-Encoding: chunked\r\n\r\n"
_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
_PROBE, _PREDICT = b"GET /healthz HTTP/1.1\r\n" + _CHUNKED, b"POST /predict HTTP/1.1\r\n" + _CHUNKED
FLOODS = {
    "trailers, to `/healthz`": (_PROBE + b"0\r\n", b"a: b\r\n"),
    "one trailer, to `/healthz`": (_PROBE + b"0\r\na: ", b"b"),
    "trailers, to `/predict`": (_PREDICT + b"1\r\nx\r\n0\r\n", b"a: b\r\n"),
    "one chunk extension": (_PREDICT + b"1", b";a=b"),
    "extensions of small chunks": (_PREDICT, b"1;" + b"a" * 100 + b"\r\nx\r\n"),
    "headers": (b"GET /healthz HTTP/1.1\r\nHost: a\r\n", b"a: b\r\n"),
    "one header": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nA: ", b"b"),
    "blank lines": (_HEALTH, b"\r\n"),
    "requests whose answers are not read": (b"", _HEALTH),
    "anything after a refusal": (b"NONSENSE\r\n\r\n", b"x"),
}
DRIPS = {
    "a body after the answer": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n", b"x"),
    "trailers after the answer": (_PROBE + b"0\r\n", b"a: b\r\n"),
    "blank lines between requests": (_HEALTH, b"\r\n"),
    "headers": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nA: ", b"b"),
}


def attack(model: Path) -> dict[str, Any]:
    """Everything once, on one server; then more connections than another one takes."""
    with Server(model, "--log-level", "warning") as server:
        floods = {what: _flood(server, *bytes_) for what, bytes_ in FLOODS.items()}
        drips = _drip_all(server)
    return {"floods": floods, "drips_s": drips, "connections": _crowd(model), "bars": _bars(floods, drips)}


def _bars(floods: dict[str, dict[str, float]], drips: dict[str, float]) -> dict[str, bool]:
    return {
        f"every flood is ended before {FLOOD_BYTES / 1e6:.0f} MB": all(
            flood["sent_mb"] < FLOOD_BYTES / 1e6 for flood in floods.values()
        ),
        f"none adds {MEMORY_MB} MB": all(flood["memory_mb"] < MEMORY_MB for flood in floods.values()),
        f"a probe is answered within {PROBE_MS} ms": all(flood["probe_ms"] < PROBE_MS for flood in floods.values()),
        f"every drip is ended within {DRIP_S:g} s": all(seconds < DRIP_S for seconds in drips.values()),
    }


class _Bystander:
    """Asks for /healthz without a pause, on a connection for each time, and reads the server's memory."""

    def __init__(self, server: Server) -> None:
        self._server, self._is_over = server, threading.Event()
        self._before = self._most = server.rss_bytes()
        self._longest_s = 0.0
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "_Bystander":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.is_set():
            start = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
            connection.close()
            self._longest_s = max(self._longest_s, time.monotonic() - start)
            self._most = max(self._most, self._server.rss_bytes())

    def figures(self) -> dict[str, float]:
        return {"memory_mb": (self._most - self._before) / 1e6, "probe_ms": 1000 * self._longest_s}


def _flood(server: Server, head: bytes, piece: bytes) -> dict[str, float]:
    """Send `piece` until the server ends the connection or the attacker's bytes or time are used up."""
    block, num_bytes, start = piece * (65536 // len(piece)), 0, time.monotonic()
    with _Bystander(server) as bystander, socket.create_connection(("127.0.0.1", server.port), timeout=FLOOD_S) as peer:
        try:
            peer.sendall(head)
            while num_bytes < FLOOD_BYTES and time.monotonic() - start < FLOOD_S:
                num_bytes += peer.send(block)
        except OSError:  # reset, or nothing is taken any more
            pass
        seconds = time.monotonic() - start
    return {"sent_mb": num_bytes / 1e6, "seconds": seconds, **bystander.figures()}


def _drip_all(server: Server) -> dict[str, float]:
    """Seconds until the server ended each, all of them at once."""
    seconds: dict[str, float] = {}
    threads = [
        threading.Thread(target=lambda what=what, bytes_=bytes_: seconds.update({what: _drip(server, *bytes_)}))
        for what, bytes_ in DRIPS.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {what: seconds[what] for what in DRIPS}


def _drip(server: Server, head: bytes, drop: bytes) -> float:
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=PAUSE_S) as peer:
        peer.sendall(head)
        while time.monotonic() - start < DRIP_S:
            try:
                if not peer.recv(65536):
                    break
                time.sleep(PAUSE_S)
                peer.sendall(drop)
            except TimeoutError:
                peer.sendall(drop)
            except OSError:
                break
    return time.monotonic() - start


def _crowd(model: Path) -> dict[str, Any]:
    """Twice as many connections as a server takes: what becomes of them, and of those inside."""
    with Server(model, "--max-connections", CONNECTIONS, "--log-level", "warning") as server:
        before = server.rss_bytes()
        peers = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(CONNECTIONS)]
        peers[0].sendall(_HEALTH)
        peers[0].recv(65536)  # the server has taken them all
        memory = (server.rss_bytes() - before) / CONNECTIONS
        beyond = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(CONNECTIONS)]
        answers = [_first_bytes(peer)[9:12].decode() or "closed" for peer in beyond]
        peers[0].sendall(_HEALTH)
        inside = peers[0].recv(65536)[9:12].decode()
        for peer in peers + beyond:
            peer.close()
    return {
        "limit": CONNECTIONS,
        "kb_each": memory / 1000,
        "inside": inside,
        "beyond": {answer: answers.count(answer) for answer in sorted(set(answers))},
    }


def _first_bytes(peer: socket.socket) -> bytes:
    try:
        return peer.recv(65536)
    except ConnectionError:
        return b""
