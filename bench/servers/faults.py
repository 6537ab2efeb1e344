"""Faults under load, and the requests that they lose: overload, signals and killed processes."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from bench.lab.load import LOST, Load, Reply, predict_request, sampled
from bench.lab.server import Server, start
from common.files import sha256, write_whole
from common.refusal import Refusal
from serve.client import AsyncClient
from serve.client_protocol import Retry

OVERLOAD_FACTOR = 10
GOODPUT_SHARE = 0.9  # of the closed-loop maximum that must be left under overload
MEMORY_SHARE = 1.1  # of the memory before that the server may take under overload
QUEUE, DEADLINE_MS = 64, 1000
SATURATING = (16, 64)  # connections, each with one request at a time
OFFERING = 512  # connections: those that the queue holds, and many that are being refused
PROBABILITY_ERROR = 1e-4  # another batch size, another order of float32 sums
RESTART_S = 30  # that a request may wait for the process after a killed one: the default of server and client


async def overload(model: Path, image: bytes, *, seconds: float) -> dict[str, Any]:
    """Measure the closed-loop maximum, offer ten times that for `seconds`, and measure the maximum again."""
    without_retry_after: list[int] = []

    def take(reply: Reply) -> None:
        if reply.status == 503 and b"\r\nretry-after: " not in reply.head:
            without_retry_after.append(reply.number)

    options = ("--max-queue", QUEUE, "--max-images", 16, "--deadline-ms", DEADLINE_MS)
    options += ("--model-threads", 1, "--log-level", "warning")
    with start(model, *options) as server:
        before = await _maxima(server.port, image, seconds / 6)
        rate = OVERLOAD_FACTOR * max(before)
        load = Load(server.port, predict_request(image), take, num_connections=OFFERING, rate=rate)
        async with sampled(server.rss_bytes, every_s=0.1) as rss:
            await load.run(seconds)
        after = await _maxima(server.port, image, seconds / 6)
        rss_after = server.rss_bytes()
    found = {
        "server": " ".join(["--runtime", "onnxruntime", *map(str, options)]),
        "closed_loop_per_s": [
            {"num": num, "before": first, "after": last}
            for num, first, last in zip(SATURATING, before, after, strict=True)
        ],
        "offered_per_s": rate,
        "seconds": seconds,
        "due": int(rate * seconds),
        "sent": load.num_sent,
        "statuses": load.statuses(),
        "accepted_per_s": load.rate(seconds),
        "goodput_share": load.rate(seconds) / max(*before, *after),
        "accepted_ms": [load.percentile_ms(200, percent) for percent in (50, 99, 100)],
        "refused_ms": [load.percentile_ms(503, percent) for percent in (50, 99)],
        "without_retry_after": len(without_retry_after),
        "rss_mb": {"before": rss[0] / 1e6, "largest": max(rss) / 1e6, "after": rss_after / 1e6},
    }
    return {**found, "bars": _overload_bars(found)}


def _overload_bars(found: dict[str, Any]) -> dict[str, bool]:
    is_advised, memory = not found["without_retry_after"], found["rss_mb"]
    return {
        f"accepted: p99 under the deadline of {DEADLINE_MS} ms": found["accepted_ms"][1] < DEADLINE_MS,
        "all others: 503 with Retry-After": found["statuses"].keys() == {"200", "503"} and is_advised,
        f"memory: at most {MEMORY_SHARE:g} times that before": memory["largest"] <= MEMORY_SHARE * memory["before"],
        f"accepted a second: at least {GOODPUT_SHARE:.0%} of the maximum": found["goodput_share"] >= GOODPUT_SHARE,
    }


async def _maxima(port: int, image: bytes, seconds: float) -> list[float]:
    """Replies 200 a second to each number of connections that ask without a pause."""
    rates = []
    for num_connections in SATURATING:
        load = Load(port, predict_request(image), num_connections=num_connections)
        await load.run(seconds)
        rates.append(load.rate(seconds))
    return rates


async def drain(model: Path, image: bytes) -> dict[str, Any]:
    """SIGTERM under load. The log says which requests the server began: each of them must have its reply."""
    with start(model) as server:
        load = Load(server.port, predict_request(image), num_connections=32)
        async with load.running():
            await asyncio.sleep(1)
            leave_s = await asyncio.to_thread(server.stop)
        begun = {int(line.split("load-")[1].split('"')[0]) for line in server.log() if '"id":"load-' in line}
    lost = len(begun - {reply.number for reply in load.replies if reply.status != LOST})
    return {
        "begun": len(begun),
        "answers": load.statuses(),
        "begun_and_lost": lost,
        "leave_s": leave_s,
        "exit_status": server.exit_status,
        "bars": {"every request that was begun is answered": not lost, "exit status 0": server.exit_status == 0},
    }


async def reload(model: Path, image: bytes, *, times: int) -> dict[str, Any]:
    """Repeat SIGHUP with two models in turn, then with a damaged file, which stays in place."""
    contents, expected = _two_models(model, image)
    answers: list[tuple[int, str, bool]] = []  # number of the request, digest, and whether it fits that model

    def take(reply: Reply) -> None:
        if reply.status == 200:
            digest = json.loads(reply.body)["model"]["digest"]
            answers.append((reply.number, digest, _fits(reply.body, expected.get(digest))))

    async def replace(server: Server, content: bytes, message: str) -> None:
        write_whole(model, content)
        await asyncio.to_thread(server.reload, message)

    with start(model, "--log-level", "warning") as server:
        load = Load(server.port, predict_request(image), take, num_connections=16)
        async with load.running():
            begin = time.monotonic()
            for turn in range(times):
                await replace(server, contents[(turn + 1) % 2], "now serving")
            seconds = time.monotonic() - begin
            last = contents[times % 2]
            await replace(server, last[: len(last) // 2], "the old model keeps serving")
            num_before_damage = load.num_sent
            await asyncio.sleep(1)
    statuses, wrong = load.statuses(), sum(not fits for *_, fits in answers)
    before, after = (
        {digest for number, digest, _ in answers if (number >= num_before_damage) == is_damaged}
        for is_damaged in (False, True)
    )
    return {
        "reloads": times,
        "seconds_each": seconds / times,
        "statuses": statuses,
        "answers_that_do_not_fit": wrong,
        "bars": {
            "no request lost": statuses.keys() == {"200"},
            "every answer fits the model that it names": not wrong and before == expected.keys(),
            "a damaged file keeps the old model": after == {sha256(last)},
        },
    }


def _two_models(path: Path, image: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """The model and, written beside it, the net with random weights; the probabilities [K] of the image by digest."""
    from bench.nets import random_net
    from common.image import decode
    from export.graphs.graph import to_onnx
    from export.runtimes.onnx_session import OnnxSession
    from fold.graph import fold

    session = OnnxSession(path)
    spec = session.model.spec
    net = fold(random_net(spec)).float()
    other = write_whole(path.with_name("other.onnx"), to_onnx(net, spec, {}).SerializeToString())
    pixels = decode(image, spec.image)[None]
    expected = {one.model.digest: one.model.probabilities(one(pixels))[0] for one in (session, OnnxSession(other))}
    return [path.read_bytes(), other.read_bytes()], expected


def _fits(body: bytes, expected: Any) -> bool:
    if expected is None:
        return False
    (result,) = json.loads(body)["results"]
    errors = [abs(guess["probability"] - expected[guess["index"]]) for guess in result["top"]]
    return result["index"] == int(expected.argmax()) and max(errors) < PROBABILITY_ERROR


async def kill(model: Path, image: bytes) -> dict[str, Any]:
    """kill -9 of one of two workers; the recovery lasts until a new process answers."""
    with start(model, "--workers", 2, "--model-threads", 1, "--log-level", "warning") as server:
        known: set[str] = set()
        while len(known) < 2:  # so that each has connections of the load
            known.add(await asyncio.to_thread(_find_worker, server))
        async with _retried(server, image, LOST) as found:
            await asyncio.sleep(1)
            os.kill(server.workers()[0], signal.SIGKILL)
            begin = time.monotonic()
            while await asyncio.to_thread(_find_worker, server) in known:
                await asyncio.sleep(0.005)
            found["recovery_s"] = time.monotonic() - begin
            await asyncio.sleep(1)
    return found


def _find_worker(server: Server) -> str:
    """The process that takes a new connection, by the first half of the ids that it gives requests."""
    while True:
        with suppress(httpx.HTTPError):  # the killed worker had taken it
            return server.client.get("/healthz").headers["x-request-id"].partition("-")[0]


async def kill_front_ends(model: Path, image: bytes, *, seconds: int, every_s: int) -> dict[str, Any]:
    """kill -9 of the device process and of one of two front ends in turn; refused requests are sent again too."""
    options = ("--model-threads", 1, "--log-level", "warning", "--deadline-ms", 1000 * RESTART_S)
    with start(model, "--front-ends", 2, *options) as server:
        async with _retried(server, image, LOST, 503) as found:
            processes = server.workers()  # two front ends and the device process
            num_killed = (seconds - 1) // every_s
            for number in range(num_killed):
                await asyncio.sleep(every_s)
                index = 0 if number % 2 else 2
                os.kill(processes[index], signal.SIGKILL)
                while not (new := set(server.workers()) - set(processes)):
                    await asyncio.sleep(0.01)
                processes[index] = new.pop()
            await asyncio.sleep(seconds - num_killed * every_s)
    return {"seconds": seconds, "num_killed": num_killed, **found}


@asynccontextmanager
async def _retried(server: Server, image: bytes, *statuses: int) -> AsyncIterator[dict[str, Any]]:
    """16 connections that ask without a pause; a request with one of `statuses` is sent once more.

    The record of the fault: at the end it has what became of the requests.
    """
    retries: list[asyncio.Task[bool]] = []

    def take(reply: Reply) -> None:
        if reply.status in statuses:
            retries.append(asyncio.create_task(_is_answered(server.url, image)))

    load, found = Load(server.port, predict_request(image), take, num_connections=16), {}
    async with load.running():
        yield found
    succeeded = sum(await asyncio.gather(*retries))
    found |= {
        "statuses": load.statuses(),
        "sent_again": len(retries),
        "answered_then": succeeded,
        "longest_wait_s": max(reply.seconds for reply in load.replies),
        "bars": {
            "every request that is sent again succeeds": succeeded == len(retries),
            "all others are answered 200": {reply.status for reply in load.replies} <= {200, *statuses},
        },
    }


async def _is_answered(url: str, image: bytes) -> bool:
    async with AsyncClient(url, retry=Retry(attempts=1), timeout_s=RESTART_S) as client:
        try:
            await client.predict([image])
        except Refusal:
            return False
    return True
