"""Attacks of strangers on a server: endless and slow requests, too many connections, and costly small files.

Each is limited in bytes and time. The server's memory and the latency of a healthy client are measured.
"""

import asyncio
import io
import select
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from bench.lab.load import HOST, Load, get_request, predict_request, sampled
from bench.lab.server import Server, start
from export.runtimes.onnx_session import OnnxSession
from serve.v2.routes import model_name

FLOOD_BYTES, FLOOD_S = 200 * 10**6, 8.0  # limits of one attacker
DRIP_S = 12.0  # for the server to end a connection
PAUSE_S = 0.25  # between two drops
MEMORY_MB = 32  # the most that one attack may add
PROBE_MS = 300  # the longest that a probe may take during an attack
CONNECTIONS = 200
_CHUNKED = b"Host: a\r\nTransfer-Encoding: chunked\r\n\r\n"
_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
_PROBE, _PREDICT = b"GET /healthz HTTP/1.1\r\n" + _CHUNKED, b"POST /predict HTTP/1.1\r\n" + _CHUNKED
# The bytes that are sent once, and those that are then repeated.
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
MEMORY_MIB = 768  # what deploy/kubernetes allows
PROBES_PER_S = 25
AFTERWARDS_S = 2.0  # during which a sender that hung up is still felt
ROOMY = ("--max-decoded-mb", "800")  # so that what the default refuses by its header is decoded
BUSY_S = 0.05  # until a sender hangs up


# Endless and slow requests, and too many connections


async def attack(model: Path) -> dict[str, Any]:
    """Every flood, then all drips together, on one server; then more connections than another one takes."""
    with start(model, "--log-level", "warning") as server:
        floods = {name: await _flood(server, *sent) for name, sent in FLOODS.items()}
        drip = partial(_send_on, server.port, pause_s=PAUSE_S, limit_s=DRIP_S)
        dripped = await asyncio.gather(*(asyncio.to_thread(drip, *sent) for sent in DRIPS.values()))
    drips = {name: {"seconds": seconds} for name, (_, seconds) in zip(DRIPS, dripped, strict=True)}
    worst = {key: max(flood[key] for flood in floods.values()) for key in ("sent_mb", "memory_mb", "probe_ms")}
    bars = {
        f"every flood is ended before {FLOOD_BYTES / 1e6:.0f} MB": worst["sent_mb"] < FLOOD_BYTES / 1e6,
        f"none adds {MEMORY_MB} MB": worst["memory_mb"] < MEMORY_MB,
        f"a probe is answered within {PROBE_MS} ms": worst["probe_ms"] < PROBE_MS,
        f"every drip is ended within {DRIP_S:g} s": max(seconds for _, seconds in dripped) < DRIP_S,
    }
    return {"floods": floods, "drips": drips, "connections": _crowd(model), "bars": bars}


async def _flood(server: Server, head: bytes, piece: bytes) -> dict[str, float]:
    """Send `piece` without a pause while another client requests /healthz without a pause."""
    block = piece * (65536 // len(piece))
    healthy = Load(server.port, get_request("/healthz"), num_connections=1)
    async with healthy.running(), sampled(server.rss_bytes, every_s=0.001) as memory:
        num_bytes, seconds = await asyncio.to_thread(_send_on, server.port, head, block, limit_s=FLOOD_S)
    return {
        "sent_mb": num_bytes / 1e6,
        "seconds": seconds,
        "memory_mb": (max(memory) - memory[0]) / 1e6,
        "probe_ms": 1000 * max(reply.seconds for reply in healthy.replies),
    }


def _send_on(port: int, head: bytes, piece: bytes, *, limit_s: float, pause_s: float = 0.0) -> tuple[int, float]:
    """Send `piece` until the server ends the connection or the limits of an attacker are reached: bytes and seconds.

    Answers are read only in a pause.
    """
    num_bytes, begin = 0, time.monotonic()
    # It ends with a reset, or where nothing is taken any more.
    with suppress(OSError), socket.create_connection((HOST, port), timeout=limit_s) as peer:
        peer.sendall(head)
        while num_bytes < FLOOD_BYTES and time.monotonic() - begin < limit_s:
            num_bytes += peer.send(piece)
            if pause_s and select.select([peer], [], [], pause_s)[0] and not peer.recv(65536):
                break
    return num_bytes, time.monotonic() - begin


def _crowd(model: Path) -> dict[str, Any]:
    """Open twice as many connections as a server accepts: the fate of those beyond the limit, and of those within."""

    def connect() -> list[socket.socket]:
        return [socket.create_connection((HOST, server.port), timeout=5) for _ in range(CONNECTIONS)]

    def status(peer: socket.socket) -> str:
        with suppress(ConnectionError):
            return peer.recv(65536)[9:12].decode() or "closed"
        return "closed"

    def ask(peer: socket.socket) -> str:
        peer.sendall(_HEALTH)
        return status(peer)

    with start(model, "--max-connections", CONNECTIONS, "--log-level", "warning") as server, ExitStack() as opened:
        before = server.rss_bytes()
        peers = [*map(opened.enter_context, connect())]
        ask(peers[0])  # the server has taken them all
        kb_each = (server.rss_bytes() - before) / CONNECTIONS / 1000
        beyond = Counter(map(status, map(opened.enter_context, connect())))
        inside = ask(peers[1])
    return {"limit": CONNECTIONS, "kb_each": kb_each, "inside": inside, "beyond": dict(sorted(beyond.items()))}


# Under siege: requests that cost the server much more than their sender


@dataclass(frozen=True)
class Attack:
    """Bodies that are sent at the same time, or one by one where their senders hang up."""

    name: str
    make_bodies: Callable[[], Sequence[bytes]]
    path: str = "/predict"
    is_json: bool = False
    hang_up: bool = False
    server: tuple[Any, ...] = ()  # options

    @property
    def probe(self) -> str:
        """The path that the healthy client requests; long JSON is parsed outside the event loop."""
        return "/healthz" if self.is_json else "/predict"


def siege_attacks(*, quick: bool) -> list[Attack]:
    """All of them; the quick form is a quarter as large."""
    side, size = (4000, 5 * 10**6) if quick else (8000, 19 * 10**6)
    half, mb = side // 2, f"{size / 1e6:.0f} MB"
    scans = f"a JPEG of {side}x{side} with {side * 12:,} scans, and its sender hangs up"
    uploads = f"80 uploads of {mb} behind 4 WebPs, and their senders hang up"
    lists, tensors = f"{mb} of empty lists", f"6 bodies of {mb} of nested lists for /v2"
    rgba = Attack(f"a PNG of {side}x{side} RGBA", lambda: [flat_png(side, "RGBA")])
    webps = Attack(f"4 WebPs of {half}x{half} noise", lambda: 4 * [noise_webp(half)])

    def late_uploads() -> list[bytes]:
        return [*webps.make_bodies(), *80 * [noise_webp(half).ljust(size, b"\0")]]

    return [
        Attack("nothing, for comparison", lambda: (), hang_up=True),
        Attack(scans, lambda: [scans_jpeg(side, side * 12)], hang_up=True),
        Attack(uploads, late_uploads, hang_up=True, server=ROOMY),
        rgba,
        replace(rgba, name="the same, where it may be decoded", server=ROOMY),
        Attack(f"a PNG of {side}x{side}, 16-bit grey", lambda: [flat_png(side, "I;16")]),
        Attack(lists, lambda: [empty_lists(size)], is_json=True),
        Attack(tensors, lambda: 6 * [nested_tensor(size)], path="/v2/models/{model}/infer", is_json=True),
        webps,
        replace(webps, name=f"{webps.name}, where all are decoded at once", server=(*ROOMY, "--decode-threads", 2)),
        Attack("4 PNGs of 100,000 chunks", lambda: 4 * [chunks_png(100_000)]),
    ]


async def siege(model: Path, image: bytes, attacks: Sequence[Attack]) -> dict[str, Any]:
    """Run each attack on a new server, beside a healthy client."""
    name = model_name(OnnxSession(model).model)
    results = [await _besiege(model, name, image, attack) for attack in attacks]
    most_mb = max(result["mb"]["largest"] for result in results if ROOMY[0] not in result["server"])
    bars = {
        "every healthy request is answered 200": all(result["probes"].keys() == {"200"} for result in results),
        f"the longest that one waits: {WORST_WAIT_S:g} s": max(r["worst_wait_s"] for r in results) <= WORST_WAIT_S,
        f"memory of server and decoders, with default limits: {MEMORY_MIB} MiB": most_mb * 1e6 <= MEMORY_MIB * 2**20,
    }
    return {"attacks": results, "bars": bars}


async def _besiege(model: Path, name: str, image: bytes, attack: Attack) -> dict[str, Any]:
    bodies = await asyncio.to_thread(attack.make_bodies)
    probe = predict_request(image) if attack.probe == "/predict" else get_request(attack.probe)
    with start(model, "--log-level", "warning", *attack.server) as server:
        read_memory = partial(server.rss_bytes, with_children=True)
        load = Load(server.port, probe, num_connections=8, rate=PROBES_PER_S)
        async with sampled(read_memory, every_s=0.02) as memory, load.running():
            await asyncio.sleep(0.5)
            answers = await _send_all(server, attack.path.format(model=name), attack, bodies)
        after = read_memory()
    return {
        "name": attack.name,
        "server": " ".join(map(str, attack.server)),
        "probe": attack.probe,
        "body_mb": sum(map(len, bodies)) / 1e6,
        "answers": dict(answers),
        "probes": load.statuses(),
        "worst_wait_s": max(reply.seconds for reply in load.replies),
        "mb": {"before": memory[0] / 1e6, "largest": max(memory) / 1e6, "after": after / 1e6},
    }


async def _send_all(server: Server, path: str, attack: Attack, bodies: Sequence[bytes]) -> Counter[str]:
    """How many bodies got each answer; in threads, so that the healthy client's loop goes on."""
    send = partial(asyncio.to_thread, _send, server, path, attack)
    if not attack.hang_up:
        return Counter(await asyncio.gather(*map(send, bodies)))
    for body in bodies:
        await send(body)
    await asyncio.sleep(AFTERWARDS_S)
    return Counter({"hung up": len(bodies)})


def _send(server: Server, path: str, attack: Attack, body: bytes) -> str:
    """The status of the answer, or "lost"."""
    headers = {"Content-Type": "application/json" if attack.is_json else "application/octet-stream"}
    timeout = httpx.Timeout(120, read=BUSY_S if attack.hang_up else 120)
    with suppress(httpx.HTTPError):
        return str(server.client.post(path, content=body, headers=headers, timeout=timeout).status_code)
    return "lost"


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
    grey = np.full((side, side), 4711, np.uint16)
    return _encode(Image.fromarray(grey) if mode == "I;16" else Image.new(mode, (side, side)), "PNG")


def noise_webp(side: int) -> bytes:
    """A WebP of noise, which takes longest to decode."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return _encode(Image.fromarray(pixels), "WEBP", quality=50, method=0)


def empty_lists(num_bytes: int) -> bytes:
    """JSON for POST /predict: a list of empty lists."""
    return b'{"images":[%b[]]}' % (b"[]," * (num_bytes // 3))


def nested_tensor(num_bytes: int) -> bytes:
    """JSON for /v2 with each pixel in a separate list."""
    head = b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[64,28,28,1],"data":['
    return head + b"[[[0]]]," * (num_bytes // 8) + b"[[[0]]]]}]}"


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
