"""python bench/reliability.py: overload, SIGTERM, SIGHUP, kill -9 and attacks, on this machine alone."""

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import httpx

from bench.lab.load import LOST, Load, Reply, predict_request, retried, sampled
from bench.lab.page import Measurement, bars_table, describe_machine, render, report_missed, typed_command
from bench.lab.server import IMAGE, MODEL, ROOT, Server, start
from common.cli import POSITIONAL, run_command
from common.files import read_whole, sha256, write_whole
from common.progress import make_console, progress

EXAMPLES = (
    "python bench/reliability.py                      # two minutes; writes docs/reliability.md and its record",
    "python bench/reliability.py --quick --out /tmp/reliability",
    "python bench/reliability.py --only attacks siege # the record keeps its other parts",
    "python bench/reliability.py --render docs/benchmarks/reliability.json",
)
TITLES = {
    "overload": "Ten times more than it can answer",
    "drain": "SIGTERM under load",
    "reload": "SIGHUP under load",
    "kill": "kill -9 of one worker of two",
    "attacks": "Endless and slow requests",
    "siege": "Under siege",
}

OVERLOAD_FACTOR = 10
GOODPUT_SHARE = 0.9  # of the closed-loop maximum that must be left under overload
MEMORY_SHARE = 1.1  # of the memory before that the server may take under overload
QUEUE, DEADLINE_MS = 64, 1000
SATURATING = (16, 64)  # connections, each with one request at a time
OFFERING = 512  # connections: those that the queue holds, and many that are being refused
PROBABILITY_ERROR = 1e-4  # another batch size, another order of float32 sums


@dataclass(frozen=True)
class ReliabilityConfig(Measurement):
    model: Annotated[Path, "plain.onnx to serve", POSITIONAL] = MODEL
    image: Annotated[Path, "the image to send"] = IMAGE
    seconds: Annotated[float, "how long ten times the maximum is offered"] = 30.0
    rounds: Annotated[int, "how often SIGTERM and kill -9 are tried"] = 5
    reloads: Annotated[int, "how often the model is exchanged"] = 30
    quick: Annotated[bool, "3 s of overload, one round, 4 reloads"] = False
    out: Annotated[Path, "folder for reliability.md and benchmarks/reliability.json"] = ROOT / "docs"
    only: Annotated[
        tuple[Literal["overload", "drain", "reload", "kill", "attacks", "siege"], ...],
        "parts to measure (default: all)",
    ] = ()
    render: Annotated[Path | None, "measure nothing: write the page of this record"] = None


def command(config: ReliabilityConfig) -> int:
    """Put a server under load on 127.0.0.1 and expose it to the faults of operators, accidents and strangers.

    Writes a record and its page. Exit status 1 if a measured bar is missed.
    """
    path = config.out / "benchmarks" / "reliability.json"
    if config.render:
        record = json.loads(read_whole(config.render))
    else:
        record = _measure(config, json.loads(read_whole(path)) if config.only else {"alone": {}})
        content = json.dumps(record, indent=1) + "\n"
        print(f"wrote {write_whole(path, content.encode())}")
    print(f"wrote {write_whole(config.out / 'reliability.md', page(record).encode())}")
    return report_missed(record, config.only or TITLES)


def _measure(config: ReliabilityConfig, record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the chosen parts measured anew; it says which of them were measured alone."""
    import uvloop

    from bench.servers import attacks

    seconds, rounds, reloads = (3.0, 1, 4) if config.quick else (config.seconds, config.rounds, config.reloads)
    about = {
        "command": typed_command("bench/reliability.py", config),
        "machine": describe_machine("onnxruntime-gpu", "onnxruntime", "uvicorn"),
    }
    with tempfile.TemporaryDirectory() as folder:
        image = read_whole(config.image)
        strangers = attacks.siege_attacks(quick=config.quick)
        turns = [
            ("overload", partial(overload, config.model, image, seconds=seconds)),
            ("reload", partial(reload, config.model, image, Path(folder), times=reloads)),
            *rounds * [("drain", partial(drain, config.model, image))],
            *rounds * [("kill", partial(kill, config.model, image))],
            ("attacks", partial(attacks.attack, config.model)),
            ("siege", partial(attacks.siege, config.model, image, strangers)),
        ]
        turns, measured = [turn for turn in turns if turn[0] in (config.only or TITLES)], defaultdict(list)
        with progress(make_console(), "reliability", len(turns)) as advance:
            for name, fault in turns:
                measured[name].append(uvloop.run(fault()))
                advance(1, name)
    if not config.only:
        return {**about, "model": config.model.name, **record, **measured}
    return {**record, **measured, "alone": {**record["alone"], **dict.fromkeys(measured, about)}}


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
        load = Load(server.port, predict_request(image), take, num_connections=OFFERING)
        async with sampled(server.rss_bytes, every_s=0.1) as rss:
            due = await load.offer(rate, seconds)
        after = await _maxima(server.port, image, seconds / 6)
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


async def drain(model: Path, image: bytes) -> dict[str, Any]:
    """SIGTERM under load. The log says which requests the server began: each of them must have its reply."""
    with start(model) as server:
        load = Load(server.port, predict_request(image), num_connections=32)
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


async def reload(model: Path, image: bytes, folder: Path, *, times: int) -> dict[str, Any]:
    """SIGHUP again and again, two models in turn, then a damaged file."""
    contents, expected = _two_models(model, image)
    path = write_whole(folder / "served.onnx", contents[0])
    answers: list[tuple[int, str, bool]] = []  # number of the request, digest, and whether it fits that model

    def take(reply: Reply) -> None:
        if reply.status == 200:
            digest = json.loads(reply.body)["model"]["digest"]
            answers.append((reply.number, digest, _fits(reply.body, expected.get(digest))))

    async def replace(server: Server, content: bytes, message: str) -> None:
        write_whole(path, content)
        await asyncio.to_thread(server.reload, message)

    with start(path, "--log-level", "warning") as server:
        load = Load(server.port, predict_request(image), take, num_connections=16)
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
            "every answer fits the model that it names": not wrong and before == expected.keys(),
            "a damaged file keeps the old model": after == {sha256(last)},
        },
    }


def _two_models(path: Path, image: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """The model and the same net with random weights; the probabilities [K] of the image, by the model's digest."""
    from bench.nets import random_net
    from common.image import decode
    from export.graphs.graph import to_onnx
    from export.runtimes.onnx_session import OnnxSession
    from export.runtimes.runtime import probabilities
    from fold.graph import fold

    with tempfile.TemporaryDirectory() as folder:
        session = OnnxSession(path)
        spec = session.model.spec
        net = fold(random_net(spec)).float()
        other = write_whole(Path(folder, "other.onnx"), to_onnx(net, spec, {}).SerializeToString())
        sessions, contents = (session, OnnxSession(other)), [path.read_bytes(), other.read_bytes()]
    pixels = decode(image, spec.image)[None]
    return contents, {one.model.digest: probabilities(one(pixels), temperature=spec.temperature)[0] for one in sessions}


def _fits(body: bytes, expected: Any) -> bool:
    if expected is None:
        return False
    (result,) = json.loads(body)["results"]
    errors = [abs(guess["probability"] - expected[guess["index"]]) for guess in result["top"]]
    return result["index"] == int(expected.argmax()) and max(errors) < PROBABILITY_ERROR


async def kill(model: Path, image: bytes) -> dict[str, Any]:
    """kill -9 of one of two workers under load; what it was answering is lost, and asked once more."""
    with start(model, "--workers", 2, "--model-threads", 1, "--log-level", "warning") as server:
        known: set[str] = set()
        while len(known) < 2:  # so that each has connections of the load
            known.add(await asyncio.to_thread(_find_worker, server))
        async with retried(server, image, LOST) as (load, retries):
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


def page(record: Mapping[str, Any]) -> str:
    return render("reliability", record, bars=bars_table(TITLES, record))


if __name__ == "__main__":
    sys.exit(run_command(command, ReliabilityConfig, examples=EXAMPLES))
