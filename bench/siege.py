"""What strangers send to hurt a server, and what a healthy client and the machine's memory notice of it."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from bench import bombs
from bench.faults import Subject, Tally
from bench.open_loop import Load, MakeRequest, predict_request
from bench.process import Server

WORST_WAIT_S = 0.3
MEMORY_BYTES = 768 * 2**20  # what deploy/kubernetes allows
PROBES_PER_S = 25
AFTERWARDS_S = 2.0  # during which a sender that hung up is still felt
ROOMY = ("--max-decoded-mb", "800")  # so that what the default refuses by its header is decoded
BUSY_S = 0.05  # until a sender hangs up


@dataclass(frozen=True)
class Attack:
    """Bodies that are sent at the same time, one by one where their senders hang up."""

    name: str
    make_bodies: Callable[[], Sequence[bytes]]
    path: str = "/predict"
    media_type: str = "application/octet-stream"
    hang_up: bool = False
    server: tuple[Any, ...] = ()
    probe: str = "/predict"


def attacks(*, quick: bool) -> list[Attack]:
    """All of them; the quick form is a quarter as large."""
    side, size = (4000, 5 * 10**6) if quick else (8000, 19 * 10**6)
    webp = Attack(f"4 WebPs of {side // 2}x{side // 2} noise", lambda: 4 * [bombs.noise_webp(side // 2)])
    lists = Attack(f"{size / 1e6:.0f} MB of empty lists", lambda: [bombs.empty_lists(size)], probe="/healthz")
    return [
        Attack("nothing, for comparison", lambda: (), hang_up=True),
        Attack(
            f"a JPEG of {side}x{side} with {side * 12:,} scans, and its sender hangs up",
            lambda: [bombs.scans_jpeg(side, side * 12)],
            hang_up=True,
        ),
        Attack(
            f"80 uploads of {size / 1e6:.0f} MB behind 4 WebPs, and their senders hang up",
            lambda: [*4 * [bombs.noise_webp(side // 2)], *80 * [_padded(bombs.noise_webp(side // 2), size)]],
            hang_up=True,
            server=ROOMY,
        ),
        Attack(f"a PNG of {side}x{side} RGBA", lambda: [bombs.flat_png(side, "RGBA")]),
        Attack("the same, where it may be decoded", lambda: [bombs.flat_png(side, "RGBA")], server=ROOMY),
        Attack(f"a PNG of {side}x{side}, 16-bit grey", lambda: [bombs.flat_png(side, "I;16")]),
        replace(lists, media_type="application/json"),
        Attack(
            f"6 bodies of {size / 1e6:.0f} MB of nested lists for /v2",
            lambda: 6 * [bombs.nested_tensor(size)],
            path="/v2/models/{model}/infer",
            media_type="application/json",
            probe="/healthz",
        ),
        webp,
        replace(webp, name=f"{webp.name}, where all are decoded at once", server=(*ROOMY, "--decode-threads", 2)),
        Attack("4 PNGs of 100,000 chunks", lambda: 4 * [bombs.chunks_png(100_000)]),
    ]


async def siege(subject: Subject, model_name: str, *, quick: bool) -> dict[str, Any]:
    """Each attack on a server of its own, beside a healthy client."""
    results = [await _attack(subject, model_name, attack) for attack in attacks(quick=quick)]
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


async def _attack(subject: Subject, model_name: str, attack: Attack) -> dict[str, Any]:
    bodies = await asyncio.to_thread(attack.make_bodies)
    path = attack.path.format(model=model_name)
    with Server(subject.model, "--log-level", "warning", *attack.server) as server:
        probe = predict_request(subject.image) if attack.probe == "/predict" else _get(attack.probe)
        tally, memory = Tally(), [server.family_bytes()]
        load = Load(server.port, probe, tally, num_connections=8)
        probing = asyncio.create_task(load.offer(PROBES_PER_S, 600))
        sampling = asyncio.create_task(_sample(server, memory))
        await asyncio.sleep(0.5)
        start = time.monotonic()
        if attack.hang_up:
            for body in bodies:
                await asyncio.to_thread(_send, server.port, path, attack.media_type, body, True)
            await asyncio.sleep(AFTERWARDS_S)
            answers = Counter({"hung up": len(bodies)})
        else:
            sent = [asyncio.to_thread(_send, server.port, path, attack.media_type, body, False) for body in bodies]
            answers = Counter(await asyncio.gather(*sent))
        seconds = time.monotonic() - start
        load.stop()
        await probing
        sampling.cancel()
        return {
            "name": attack.name,
            "server": [str(argument) for argument in attack.server],
            "probe": attack.probe,
            "body_mb": sum(map(len, bodies)) / 1e6,
            "answers": dict(answers),
            "seconds": seconds,
            "probes": tally.statuses(),
            "worst_wait_s": max(taken for _, taken, _ in tally.answers),
            "mb": {"before": memory[0] / 1e6, "largest": max(memory) / 1e6, "after": server.family_bytes() / 1e6},
        }


def _send(port: int, path: str, media_type: str, body: bytes, hang_up: bool) -> str:
    """The status of the answer, or "lost"; in a thread, so that the healthy client's loop goes on."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    status = b""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection, suppress(ConnectionError):
        connection.sendall(head.encode())
        connection.sendall(body)
        if hang_up:
            time.sleep(BUSY_S)
        else:
            status = connection.recv(2**16)[9:12]
    return status.decode() or "lost"


def _get(path: str) -> MakeRequest:
    request = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    return lambda number: request


def _padded(content: bytes, size: int) -> bytes:
    return content + bytes(max(0, size - len(content)))


async def _sample(server: Server, memory: list[int]) -> None:
    while True:
        memory.append(server.family_bytes())
        await asyncio.sleep(0.02)
