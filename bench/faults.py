"""What is done to a server under load, and what became of its requests: overload, SIGTERM, SIGHUP and kill -9."""

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.open_loop import LOST, Answer, Load, predict_request
from bench.process import Server
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
    expected: dict[str, np.ndarray]  # probabilities [K] of the image, by the model's digest


class Tally:
    """Takes answers: how many of each status, and how long they took."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self.answers: list[tuple[int, float, float]] = []  # status, seconds, and when
        self.num_without_retry_after = 0

    def __call__(self, answer: Answer) -> None:
        self.answers.append((answer.status, answer.seconds, self._clock()))
        if answer.status == 503 and b"\r\nretry-after: " not in answer.head:
            self.num_without_retry_after += 1

    def statuses(self) -> dict[str, int]:
        counts = Counter(status for status, _, _ in self.answers)
        return {str(status) if status else "lost": count for status, count in sorted(counts.items())}

    def rate(self, start: float, seconds: float) -> float:
        """Answers 200 a second that came within `seconds` of `start`."""
        return sum(status == 200 and when - start <= seconds for status, _, when in self.answers) / seconds

    def percentile_ms(self, status: int, percent: float) -> float:
        return 1000 * float(np.percentile([taken for found, taken, _ in self.answers if found == status], percent))


async def overload(subject: Subject, *, seconds: float) -> dict[str, Any]:
    """The closed-loop maximum, then ten times that, whatever becomes of it, then the maximum again."""
    limits = ("--max-queue", QUEUE, "--max-images", 16, "--deadline-ms", DEADLINE_MS)
    with Server(subject.model, *limits, "--model-threads", 1, "--log-level", "warning") as server:
        before = await _maxima(server.port, subject.image, seconds / 6)
        rss = [server.rss_bytes()]
        rate = OVERLOAD_FACTOR * max(before.values())
        tally = Tally()
        load = Load(server.port, predict_request(subject.image), tally, num_connections=OFFERING)
        sampling = asyncio.create_task(_sample(server, rss))
        due = await load.offer(rate, seconds)
        sampling.cancel()
        after = await _maxima(server.port, subject.image, seconds / 6)
        maximum = max(*before.values(), *after.values())
        goodput, p99_ms = tally.rate(load.start, seconds), tally.percentile_ms(200, 99)
        statuses, rss_after = tally.statuses(), server.rss_bytes()
        return {
            "server": server.argv,
            "closed_loop_per_s": {"before": before, "after": after},
            "offered_per_s": rate,
            "seconds": seconds,
            "due": due,
            "sent": load.num_sent,
            "statuses": statuses,
            "accepted_per_s": goodput,
            "goodput_share": goodput / maximum,
            "accepted_ms": {str(percent): tally.percentile_ms(200, percent) for percent in (50, 99, 100)},
            "refused_ms": {str(percent): tally.percentile_ms(503, percent) for percent in (50, 99)},
            "without_retry_after": tally.num_without_retry_after,
            "rss_mb": {"before": rss[0] / 1e6, "largest": max(rss) / 1e6, "after": rss_after / 1e6},
            "bars": {
                f"accepted: p99 under the deadline of {DEADLINE_MS} ms": p99_ms < DEADLINE_MS,
                "all others: 503 with Retry-After": statuses.keys() == {"200", "503"}
                and not tally.num_without_retry_after,
                f"memory: at most {MEMORY_SHARE:g} times that before": max(rss) <= MEMORY_SHARE * rss[0],
                f"accepted a second: at least {GOODPUT_SHARE:.0%} of the maximum": goodput >= GOODPUT_SHARE * maximum,
            },
        }


async def drain(subject: Subject) -> dict[str, Any]:
    """SIGTERM under load. Its log says which requests the server began: each of them must have its answer."""
    with Server(subject.model) as server:
        answered: Counter[str] = Counter()
        answered_numbers: set[int] = set()

        def take(answer: Answer) -> None:
            answered[str(answer.status) if answer.status else "lost"] += 1
            if answer.status != LOST:
                answered_numbers.add(answer.number)

        load = Load(server.port, predict_request(subject.image), take, num_connections=32)
        running = asyncio.create_task(load.saturate(60))
        await asyncio.to_thread(server.wait_for, "POST /predict")
        await asyncio.sleep(1)
        server.send(signal.SIGTERM)
        start = time.monotonic()
        exit_status = await asyncio.to_thread(server.wait)
        leave_s = time.monotonic() - start
        load.stop()
        await running
        begun = {int(line.split("load-")[1].split('"')[0]) for line in server.log if '"id":"load-' in line}
        lost = len(begun - answered_numbers)
        return {
            "sent": load.num_sent,
            "begun": len(begun),
            "answers": dict(answered),
            "begun_and_lost": lost,
            "connections_refused": load.num_refused,
            "leave_s": leave_s,
            "exit_status": exit_status,
            "bars": {"every request that was begun is answered": not lost, "exit status 0": exit_status == 0},
        }


async def reload(subject: Subject, folder: Path, *, times: int) -> dict[str, Any]:
    """SIGHUP again and again, two models in turn, then a damaged file."""
    contents = [subject.model.read_bytes(), subject.other.read_bytes()]
    path = write_whole(folder / "served.onnx", contents[0])
    statuses: Counter[int] = Counter()
    digests: set[str] = set()
    digests_after_damage: set[str] = set()
    wrong, first_after_damage = 0, sys.maxsize

    def take(answer: Answer) -> None:
        nonlocal wrong
        statuses[answer.status] += 1
        if answer.status == 200:
            digest = json.loads(answer.body)["model"]["digest"]
            (digests if answer.number < first_after_damage else digests_after_damage).add(digest)
            wrong += not _fits(answer.body, subject.expected.get(digest))

    with Server(path, "--log-level", "warning") as server:
        load = Load(server.port, predict_request(subject.image), take, num_connections=16)
        running = asyncio.create_task(load.saturate(600))
        start = time.monotonic()
        for turn in range(times):
            await _reload(server, path, contents[(turn + 1) % 2], "now serving")
        seconds = time.monotonic() - start
        last = contents[times % 2]
        await _reload(server, path, last[: len(last) // 2], "the old model keeps serving")
        first_after_damage = load.num_sent
        await asyncio.sleep(1)
        load.stop()
        await running
    return {
        "reloads": times,
        "seconds_each": seconds / times,
        "statuses": {str(status) if status else "lost": count for status, count in statuses.items()},
        "digests": sorted(digests),
        "answers_that_do_not_fit": wrong,
        "bars": {
            "no request lost": statuses.keys() == {200},
            "every answer fits the model that it names": not wrong and digests == subject.expected.keys(),
            "a damaged file keeps the old model": digests_after_damage == {sha256(last)},
        },
    }


async def kill(subject: Subject) -> dict[str, Any]:
    """kill -9 of one worker of two. What was lost is asked once more, with the project's own client."""
    with Server(subject.model, "--workers", 2, "--model-threads", 1, "--log-level", "warning") as server:
        statuses: Counter[int] = Counter()
        retries: list[asyncio.Task[bool]] = []

        def take(answer: Answer) -> None:
            statuses[answer.status] += 1
            if answer.status == LOST:
                retries.append(asyncio.create_task(ask_again(server.url, subject.image)))

        load = Load(server.port, predict_request(subject.image), take, num_connections=16)
        running = asyncio.create_task(load.saturate(60))
        await asyncio.sleep(1)
        known: set[bytes] = set()
        while len(known) < 2:
            known.add(await _process_of(server.port))
        os.kill(server.workers()[0], signal.SIGKILL)
        start = time.monotonic()
        while await _process_of(server.port) in known:
            await asyncio.sleep(0.005)
        recovery_s = time.monotonic() - start
        await asyncio.sleep(1)
        load.stop()
        await running
        succeeded = sum(await asyncio.gather(*retries))
    return {
        "statuses": {str(status) if status else "lost": count for status, count in statuses.items()},
        "lost": len(retries),
        "lost_and_answered_on_one_retry": succeeded,
        "recovery_s": recovery_s,
        "bars": {
            "every lost request succeeds on one retry": succeeded == len(retries),
            "all others are answered 200": statuses.keys() <= {200, LOST},
        },
    }


async def _maxima(port: int, image: bytes, seconds: float) -> dict[str, float]:
    """Answers a second, by the number of connections that ask without a pause."""
    rates = {}
    for num_connections in SATURATING:
        tally = Tally()
        load = Load(port, predict_request(image), tally, num_connections=num_connections)
        await load.saturate(seconds)
        rates[str(num_connections)] = tally.rate(load.start, seconds)
    return rates


async def _sample(server: Server, rss: list[int]) -> None:
    while True:
        rss.append(server.rss_bytes())
        await asyncio.sleep(0.1)


async def _reload(server: Server, path: Path, content: bytes, message: str) -> None:
    write_whole(path, content)
    num_lines = len(server.log)
    server.send(signal.SIGHUP)
    await asyncio.to_thread(server.wait_for, message, after=num_lines)


def _fits(body: bytes, expected: np.ndarray | None) -> bool:
    if expected is None:
        return False
    (result,) = json.loads(body)["results"]
    is_best = result["index"] == int(expected.argmax())
    errors = [abs(guess["probability"] - expected[guess["index"]]) for guess in result["top"]]
    return is_best and max(errors) < PROBABILITY_ERROR


async def ask_again(url: str, image: bytes) -> bool:
    """Whether one more request is answered."""
    async with AsyncClient(url, retry=Retry(attempts=1)) as client:
        try:
            await client.predict([image])
        except Refusal:
            return False
    return True


async def _process_of(port: int) -> bytes:
    """What tells apart the process that takes a new connection: the first half of the ids that it gives requests."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        head = (await reader.read()).lower()
    except ConnectionError:  # the worker that was killed had taken it
        return await _process_of(port)
    finally:
        writer.close()
    if not head:
        return await _process_of(port)
    return head.partition(b"x-request-id: ")[2].partition(b"-")[0]
