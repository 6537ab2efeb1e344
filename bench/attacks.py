"""Attacks of strangers on a server: endless and slow requests, too many connections, and costly small files.

Each is bounded in bytes and time. Measured are the server's memory and the waiting of a healthy client.
"""

import asyncio
import http.client
import io
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.faults import Subject, sampled
from bench.lab.load import Load, Tally, predict_request
from bench.lab.server import Server, start

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
WORST_WAIT_S = 0.3
MEMORY_BYTES = 768 * 2**20  # what deploy/kubernetes allows
PROBES_PER_S = 25
AFTERWARDS_S = 2.0  # during which a sender that hung up is still felt
ROOMY = ("--max-decoded-mb", "800")  # so that what the default refuses by its header is decoded
BUSY_S = 0.05  # until a sender hangs up


# Endless and slow requests, and too many connections


def attack(model: Path) -> dict[str, Any]:
    """Every flood, then all drips together, on one server; then more connections than another one takes."""
    with start(model, "--log-level", "warning") as server:
        floods = {what: _flood(server, *bytes_) for what, bytes_ in FLOODS.items()}
        drips = _drip_all(server)
    bars = {
        f"every flood is ended before {FLOOD_BYTES / 1e6:.0f} MB": all(
            flood["sent_mb"] < FLOOD_BYTES / 1e6 for flood in floods.values()
        ),
        f"none adds {MEMORY_MB} MB": all(flood["memory_mb"] < MEMORY_MB for flood in floods.values()),
        f"a probe is answered within {PROBE_MS} ms": all(flood["probe_ms"] < PROBE_MS for flood in floods.values()),
        f"every drip is ended within {DRIP_S:g} s": all(seconds < DRIP_S for seconds in drips.values()),
    }
    return {"floods": floods, "drips_s": drips, "connections": _crowd(model), "bars": bars}


@contextmanager
def _bystander(server: Server) -> Iterator[dict[str, float]]:
    """Asks for /healthz without a pause, each time on a new connection: the longest wait, and the memory added."""
    before, is_over = server.rss_bytes(), threading.Event()
    found = {"memory_mb": 0.0, "probe_ms": 0.0}

    def watch() -> None:
        while not is_over.is_set():
            begin = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
            connection.close()
            found["probe_ms"] = max(found["probe_ms"], 1000 * (time.monotonic() - begin))
            found["memory_mb"] = max(found["memory_mb"], (server.rss_bytes() - before) / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def _flood(server: Server, head: bytes, piece: bytes) -> dict[str, float]:
    """Send `piece` until the server ends the connection or the attacker's bytes or time are used up."""
    block, num_bytes, begin = piece * (65536 // len(piece)), 0, time.monotonic()
    with _bystander(server) as found, socket.create_connection(("127.0.0.1", server.port), timeout=FLOOD_S) as peer:
        with suppress(OSError):  # reset, or nothing is taken any more
            peer.sendall(head)
            while num_bytes < FLOOD_BYTES and time.monotonic() - begin < FLOOD_S:
                num_bytes += peer.send(block)
        seconds = time.monotonic() - begin
    return {"sent_mb": num_bytes / 1e6, "seconds": seconds, **found}


def _drip_all(server: Server) -> dict[str, float]:
    """Seconds until the server ended each, all of them at once."""
    seconds = dict.fromkeys(DRIPS, 0.0)
    threads = [
        threading.Thread(target=lambda what=what, bytes_=bytes_: seconds.update({what: _drip(server, *bytes_)}))
        for what, bytes_ in DRIPS.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def _drip(server: Server, head: bytes, drop: bytes) -> float:
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=PAUSE_S) as peer:
        peer.sendall(head)
        while time.monotonic() - begin < DRIP_S:
            try:
                if not peer.recv(65536):
                    break
                time.sleep(PAUSE_S)
                peer.sendall(drop)
            except TimeoutError:
                peer.sendall(drop)
            except OSError:
                break
    return time.monotonic() - begin


def _crowd(model: Path) -> dict[str, Any]:
    """Twice as many connections as a server takes: what becomes of them, and of those inside."""
    with start(model, "--max-connections", CONNECTIONS, "--log-level", "warning") as server:
        before = server.rss_bytes()
        peers = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(CONNECTIONS)]
        peers[0].sendall(_HEALTH)
        peers[0].recv(65536)  # the server has taken them all
        memory = (server.rss_bytes() - before) / CONNECTIONS
        beyond = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(CONNECTIONS)]
        answers = Counter(_first_bytes(peer)[9:12].decode() or "closed" for peer in beyond)
        peers[0].sendall(_HEALTH)
        inside = peers[0].recv(65536)[9:12].decode()
        for peer in peers + beyond:
            peer.close()
    return {
        "limit": CONNECTIONS,
        "kb_each": memory / 1000,
        "inside": inside,
        "beyond": dict(sorted(answers.items())),
    }


def _first_bytes(peer: socket.socket) -> bytes:
    try:
        return peer.recv(65536)
    except ConnectionError:
        return b""


# Under siege: requests that cost the server much more than their sender


@dataclass(frozen=True)
class Attack:
    """Bodies that are sent at the same time, or one by one where their senders hang up."""

    name: str
    make_bodies: Callable[[], Sequence[bytes]]
    path: str = "/predict"
    media_type: str = "application/octet-stream"
    hang_up: bool = False
    server: tuple[Any, ...] = ()  # options
    probe: str = "/predict"  # what the healthy client asks for


def siege_attacks(*, quick: bool) -> list[Attack]:
    """All of them; the quick form is a quarter as large."""
    side, size = (4000, 5 * 10**6) if quick else (8000, 19 * 10**6)
    webp = Attack(f"4 WebPs of {side // 2}x{side // 2} noise", lambda: 4 * [noise_webp(side // 2)])
    lists = Attack(f"{size / 1e6:.0f} MB of empty lists", lambda: [empty_lists(size)], probe="/healthz")
    return [
        Attack("nothing, for comparison", lambda: (), hang_up=True),
        Attack(
            f"a JPEG of {side}x{side} with {side * 12:,} scans, and its sender hangs up",
            lambda: [scans_jpeg(side, side * 12)],
            hang_up=True,
        ),
        Attack(
            f"80 uploads of {size / 1e6:.0f} MB behind 4 WebPs, and their senders hang up",
            lambda: [*4 * [noise_webp(side // 2)], *80 * [noise_webp(side // 2).ljust(size, b"\0")]],
            hang_up=True,
            server=ROOMY,
        ),
        Attack(f"a PNG of {side}x{side} RGBA", lambda: [flat_png(side, "RGBA")]),
        Attack("the same, where it may be decoded", lambda: [flat_png(side, "RGBA")], server=ROOMY),
        Attack(f"a PNG of {side}x{side}, 16-bit grey", lambda: [flat_png(side, "I;16")]),
        replace(lists, media_type="application/json"),
        Attack(
            f"6 bodies of {size / 1e6:.0f} MB of nested lists for /v2",
            lambda: 6 * [nested_tensor(size)],
            path="/v2/models/{model}/infer",
            media_type="application/json",
            probe="/healthz",
        ),
        webp,
        replace(webp, name=f"{webp.name}, where all are decoded at once", server=(*ROOMY, "--decode-threads", 2)),
        Attack("4 PNGs of 100,000 chunks", lambda: 4 * [chunks_png(100_000)]),
    ]


async def siege(subject: Subject, model_name: str, attacks: Sequence[Attack]) -> dict[str, Any]:
    """Each attack on a server of its own, beside a healthy client."""
    results = [await _besiege(subject, model_name, attack) for attack in attacks]
    served = [result for result in results if not set(ROOMY) <= set(result["server"])]
    return {
        "attacks": results,
        "bars": {
            "every healthy request is answered 200": all(result["probes"].keys() == {"200"} for result in results),
            f"the longest that one waits: {WORST_WAIT_S:g} s": all(
                result["worst_wait_s"] <= WORST_WAIT_S for result in results
            ),
            f"memory of server and decoders, with default limits: {MEMORY_BYTES / 2**20:.0f} MiB": all(
                result["mb"]["largest"] * 1e6 <= MEMORY_BYTES for result in served
            ),
        },
    }


async def _besiege(subject: Subject, model_name: str, attack: Attack) -> dict[str, Any]:
    bodies = await asyncio.to_thread(attack.make_bodies)
    path = attack.path.format(model=model_name)
    get = f"GET {attack.probe} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    probe = predict_request(subject.image) if attack.probe == "/predict" else lambda number: get
    with start(subject.model, "--log-level", "warning", *attack.server) as server:
        tally = Tally()
        load = Load(server.port, probe, tally, num_connections=8)
        async with sampled(server.family_bytes, every_s=0.02) as memory:
            probing = asyncio.create_task(load.offer(PROBES_PER_S, 600))
            await asyncio.sleep(0.5)
            begin = time.monotonic()
            answers = await _send_all(server.port, path, attack, bodies)
            seconds = time.monotonic() - begin
            load.stop()
            await probing
        after = server.family_bytes()
    return {
        "name": attack.name,
        "server": [str(argument) for argument in attack.server],
        "probe": attack.probe,
        "body_mb": sum(map(len, bodies)) / 1e6,
        "answers": dict(answers),
        "seconds": seconds,
        "probes": tally.statuses(),
        "worst_wait_s": max(taken for _, taken, _ in tally.replies),
        "mb": {"before": memory[0] / 1e6, "largest": max(memory) / 1e6, "after": after / 1e6},
    }


async def _send_all(port: int, path: str, attack: Attack, bodies: Sequence[bytes]) -> Counter[str]:
    """How many bodies got each answer; in threads, so that the healthy client's loop goes on."""
    if not attack.hang_up:
        sent = [asyncio.to_thread(_send, port, path, attack, body) for body in bodies]
        return Counter(await asyncio.gather(*sent))
    for body in bodies:
        await asyncio.to_thread(_send, port, path, attack, body)
    await asyncio.sleep(AFTERWARDS_S)
    return Counter({"hung up": len(bodies)})


def _send(port: int, path: str, attack: Attack, body: bytes) -> str:
    """The status of the answer, or "lost"."""
    fields = f"Content-Type: {attack.media_type}\r\nContent-Length: {len(body)}"
    status = b""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection, suppress(ConnectionError):
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n".encode())
        connection.sendall(body)
        if attack.hang_up:
            time.sleep(BUSY_S)
        else:
            status = connection.recv(2**16)[9:12]
    return status.decode() or "lost"


def scans_jpeg(side: int, num_scans: int) -> bytes:
    """A grey progressive JPEG of few bytes that repeats its last scan; each decodes every block anew."""
    file = _encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    scan = file[file.rindex(b"\xff\xda") : -2]
    return file[:-2] + num_scans * scan + file[-2:]


def chunks_png(num_chunks: int) -> bytes:
    """A PNG of one pixel behind chunks of an unknown kind."""
    file = _encode(Image.new("L", (1, 1)), "PNG")
    empty = bytes(4) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    return file[:33] + num_chunks * empty + file[33:]


def flat_png(side: int, mode: str) -> bytes:
    """A PNG of one colour: a thousandth of its pixels' bytes."""
    if mode == "I;16":
        return _encode(Image.fromarray(np.full((side, side), 4711, np.uint16)), "PNG")
    return _encode(Image.new(mode, (side, side)), "PNG")


def noise_webp(side: int) -> bytes:
    """A WebP of noise, which takes longest to decode."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return _encode(Image.fromarray(pixels), "WEBP", quality=50, method=0)


def empty_lists(num_bytes: int) -> bytes:
    """JSON for POST /predict: a list of empty lists."""
    return b'{"images":[%b[]]}' % (b"[]," * (num_bytes // 3))


def nested_tensor(num_bytes: int) -> bytes:
    """JSON for /v2: pixels, each in a list of its own."""
    head = b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[64,28,28,1],"data":['
    return head + b"[[[0]]]," * (num_bytes // 8) + b"[[[0]]]]}]}"


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
