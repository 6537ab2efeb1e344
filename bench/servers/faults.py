"""Faults of a server under load, and what became of its requests: overload, SIGTERM, SIGHUP and kill -9."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.lab.load import LOST, Load, Reply, predict_request
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


@dataclass(frozen=True)
class Subject:
    """What is served and asked: a model, the same net with other weights, and one image."""

    model: Path
    other: Path
    image: bytes
    name: str  # of the model
    expected: dict[str, np.ndarray]  # probabilities [K] of the image, by the model's digest


async def overload(subject: Subject, *, seconds: float) -> dict[str, Any]:
    """Measure the closed-loop maximum, offer ten times that for `seconds`, and measure the maximum again."""
    without_retry_after: list[int] = []

    def take(reply: Reply) -> None:
        if reply.status == 503 and b"\r\nretry-after: " not in reply.head:
            without_retry_after.append(reply.number)

    options = ("--max-queue", QUEUE, "--max-images", 16, "--deadline-ms", DEADLINE_MS)
    options += ("--model-threads", 1, "--log-level", "warning")
    with start(subject.model, *options) as server:
        before = await _maxima(server.port, subject.image, seconds / 6)
        rate = OVERLOAD_FACTOR * max(before)
        load = Load(server.port, predict_request(subject.image), take, num_connections=OFFERING)
        async with sampled(server.rss_bytes, every_s=0.1) as rss:
            due = await load.offer(rate, seconds)
        after = await _maxima(server.port, subject.image, seconds / 6)
        rss_after = server.rss_bytes()
    maximum = max(*before, *after)
    goodput, p99_ms, statuses = load.rate(seconds), load.percentile_ms(200, 99), load.statuses()
    return {
        "server": " ".join(["--runtime", "onnxruntime", *map(str, options)]),
        "closed_loop_per_s": [
            {"num": num, "before": first, "after": last}
            for num, first, last in zip(SATURATING, before, after, strict=True)
        ],
        "offered_per_s": rate,
        "seconds": seconds,
        "due": due,
        "sent": load.num_sent,
        "statuses": statuses,
        "accepted_per_s": goodput,
        "goodput_share": goodput / maximum,
        "accepted_ms": [load.percentile_ms(200, percent) for percent in (50, 99, 100)],
        "refused_ms": [load.percentile_ms(503, percent) for percent in (50, 99)],
        "without_retry_after": len(without_retry_after),
        "rss_mb": {"before": rss[0] / 1e6, "largest": max(rss) / 1e6, "after": rss_after / 1e6},
        "bars": {
            f"accepted: p99 under the deadline of {DEADLINE_MS} ms": p99_ms < DEADLINE_MS,
            "all others: 503 with Retry-After": statuses.keys() == {"200", "503"} and not without_retry_after,
            f"memory: at most {MEMORY_SHARE:g} times that before": max(rss) <= MEMORY_SHARE * rss[0],
            f"accepted a second: at least {GOODPUT_SHARE:.0%} of the maximum": goodput >= GOODPUT_SHARE * maximum,
        },
    }


async def _maxima(port: int, image: bytes, seconds: float) -> list[float]:
    """Replies 200 a second to each number of connections that ask without a pause."""
    rates = []
    for num_connections in SATURATING:
        load = Load(port, predict_request(image), num_connections=num_connections)
        await load.saturate(seconds)
        rates.append(load.rate(seconds))
    return rates


async def drain(subject: Subject) -> dict[str, Any]:
    """SIGTERM under load. The log says which requests the server began: each of them must have its reply."""
    with start(subject.model) as server:
        load = Load(server.port, predict_request(subject.image), num_connections=32)
        async with load.saturating():
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


async def reload(subject: Subject, folder: Path, *, times: int) -> dict[str, Any]:
    """SIGHUP again and again, two models in turn, then a damaged file."""
    contents = [subject.model.read_bytes(), subject.other.read_bytes()]
    path = write_whole(folder / "served.onnx", contents[0])
    answers: list[tuple[int, str, bool]] = []  # number of the request, digest, and whether it fits that model

    def take(reply: Reply) -> None:
        if reply.status == 200:
            digest = json.loads(reply.body)["model"]["digest"]
            answers.append((reply.number, digest, _fits(reply.body, subject.expected.get(digest))))

    async def replace(server: Server, content: bytes, message: str) -> None:
        write_whole(path, content)
        await asyncio.to_thread(server.reload, message)

    with start(path, "--log-level", "warning") as server:
        load = Load(server.port, predict_request(subject.image), take, num_connections=16)
        async with load.saturating():
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
            "every answer fits the model that it names": not wrong and before == subject.expected.keys(),
            "a damaged file keeps the old model": after == {sha256(last)},
        },
    }


def _fits(body: bytes, expected: np.ndarray | None) -> bool:
    if expected is None:
        return False
    (result,) = json.loads(body)["results"]
    errors = [abs(guess["probability"] - expected[guess["index"]]) for guess in result["top"]]
    return result["index"] == int(expected.argmax()) and max(errors) < PROBABILITY_ERROR


async def kill(subject: Subject) -> dict[str, Any]:
    """kill -9 of one of two workers under load; what it was answering is lost, and asked once more."""
    with start(subject.model, "--workers", 2, "--model-threads", 1, "--log-level", "warning") as server:
        known: set[str] = set()
        while len(known) < 2:  # so that each has connections of the load
            known.add(await asyncio.to_thread(_find_worker, server))
        async with retried(server, subject.image, LOST) as (load, retries):
            await asyncio.sleep(1)
            os.kill(server.workers()[0], signal.SIGKILL)
            begin = time.monotonic()
            while await asyncio.to_thread(_find_worker, server) in known:
                await asyncio.sleep(0.005)
            recovery_s = time.monotonic() - begin
            await asyncio.sleep(1)
    statuses, succeeded = load.statuses(), sum(task.result() for task in retries)
    return {
        "statuses": statuses,
        "lost": len(retries),
        "lost_and_answered_on_one_retry": succeeded,
        "recovery_s": recovery_s,
        "bars": {
            "every lost request succeeds on one retry": succeeded == len(retries),
            "all others are answered 200": statuses.keys() <= {"200", "lost"},
        },
    }


def _find_worker(server: Server) -> str:
    """The process that takes a new connection, by the first half of the ids that it gives requests."""
    while True:
        with suppress(httpx.HTTPError):  # the killed worker had taken it
            return server.client.get("/healthz").headers["x-request-id"].partition("-")[0]


@asynccontextmanager
async def retried(server: Server, image: bytes, *statuses: int) -> AsyncIterator[tuple[Load, list[asyncio.Task[bool]]]]:
    """16 connections that ask without a pause; each request with one of `statuses` is sent once more.

    At the end, each of these tasks says whether it was answered then.
    """
    retries: list[asyncio.Task[bool]] = []

    def take(reply: Reply) -> None:
        if reply.status in statuses:
            retries.append(asyncio.create_task(_ask_again(server.url, image)))

    load = Load(server.port, predict_request(image), take, num_connections=16)
    async with load.saturating():
        yield load, retries
    await asyncio.gather(*retries)


async def _ask_again(url: str, image: bytes) -> bool:
    async with AsyncClient(url, retry=Retry(attempts=1)) as client:
        try:
            await client.predict([image])
        except Refusal:
            return False
    return True


@asynccontextmanager
async def sampled(read: Callable[[], int], *, every_s: float) -> AsyncIterator[list[int]]:
    """What `read` returns before, and again and again meanwhile."""
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
