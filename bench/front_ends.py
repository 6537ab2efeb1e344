"""python bench/front_ends.py: front ends that share one model, measured here and, on paper, on many cores."""

import os
import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.load import put_load, refuse_without_tools
from bench.lab.page import Measurement, Record, bars_table, describe_machine, publish, render, report_missed
from bench.lab.rounds import turns
from bench.lab.server import IMAGE, MODEL, ROOT, Server, start
from common.cli import POSITIONAL, run_command
from common.progress import make_console, progress
from common.refusal import Refusal

EXAMPLES = (
    "python bench/front_ends.py                      # a minute; writes docs/benchmarks/front-ends.md and its record",
    "python bench/front_ends.py --quick --out runs/bench",
)
FRONT_ENDS = {"one": 1, "two": 2}
SIMULATED = ROOT / "bench" / "servers" / "simulated.py"
ON_PAPER = (1, 2, 4, 8, 12, 16)
MAX_BATCH = 256
BAR = 0.9
TITLES = {"scaling": "What they cost"}


@dataclass(frozen=True)
class FrontEndsConfig(Measurement):
    model: Annotated[Path, "plain.onnx whose images and labels are taken", POSITIONAL] = MODEL
    image: Annotated[Path, "the image to send"] = IMAGE
    device_us: Annotated[tuple[float, float], "t0 and t1: the simulated device takes t0 + n t1 for n images"] = (200, 4)
    connections: Annotated[int, "without a pause, for each front end"] = 32
    rounds: Annotated[int, "rounds that alternate over the numbers of front ends"] = 3
    seconds: Annotated[int, "of one measurement"] = 3
    quick: Annotated[bool, "one round of a second each"] = False
    out: Annotated[Path, "folder for front-ends.md and front-ends.json"] = ROOT / "docs" / "benchmarks"


def command(config: FrontEndsConfig) -> int:
    """Measure front ends in front of a simulated device on 127.0.0.1, and compute the requests/s of more of them.

    Writes a record and its page. Exit status 1 if a bar of the record is missed.
    """
    scaling = _scaling(replace(config, rounds=1, seconds=1) if config.quick else config)
    publish(config, "front-ends", page, machine=describe_machine("numpy", "uvicorn"), **scaling)
    return report_missed({"scaling": scaling}, TITLES)


def _scaling(config: FrontEndsConfig) -> dict[str, Any]:
    from bench.servers.simulated import hand_over

    refuse_without_tools()
    rounds: list[dict[str, dict[str, float]]] = []
    with progress(make_console(), "front ends", config.rounds * len(FRONT_ENDS) + 1) as advance:
        for _, names in turns(list(FRONT_ENDS), config.rounds):
            rounds.append({})
            for name in names:
                rounds[-1][name] = _measure(config, FRONT_ENDS[name])
                advance(1, f"{name} front ends")
        device_process = hand_over(config.model, MAX_BATCH, 50 if config.quick else 1000)
        advance(1, "hand-over")
    paper = _on_paper(config.device_us, rounds, device_process)
    worst = _median(rounds, "two", "p99_ms") / _median(rounds, "one", "p99_ms")
    return {
        "device_us": list(config.device_us),
        "connections": config.connections,
        "seconds": config.seconds,
        "rounds": rounds,
        "device_process": device_process,
        "paper": paper,
        "bars": {
            f"on paper, N front ends answer at least {BAR:g} N times what one process does, or {BAR:.0%} of what the "
            "device can": all(row["share"] >= BAR for row in paper),
            "p99 of two front ends with twice the connections is no worse": worst <= 1,
        },
    }


def _measure(config: FrontEndsConfig, num: int) -> dict[str, float]:
    """Throughput, latency and processor time of one server under a load without pauses."""
    from bench.servers.simulated import TIMES

    env = {**os.environ, TIMES: ",".join(f"{time:g}" for time in config.device_us)}
    options = ("--front-ends", num, "--max-batch", MAX_BATCH, "--decode-threads", 0, "--log-level", "warning")
    with start(config.model, *options, program=[SIMULATED], env=env) as server:
        processes = server.workers() or [server.pid]
        for index, process in enumerate(processes):
            pin = ["taskset", "--all-tasks", "--cpu-list", "--pid", str(index % 2 if num > 1 else 0), str(process)]
            subprocess.run(pin, check=True, stdout=subprocess.DEVNULL)
        load = partial(put_load, server.url, "/predict", "image/png", [config.image])
        load = partial(load, num_connections=num * config.connections)
        load(seconds=1)
        before = [*map(_cpu_s, processes), *_batches(server)]
        result = load(seconds=config.seconds)
        after = [*map(_cpu_s, processes), *_batches(server)]
    if result["failures"]:
        raise Refusal(f"{num} front ends fail {result['failures']} requests")
    *took, count, images = (then - first for first, then in zip(before, after, strict=True))
    num_requests = result["requests_per_s"] * config.seconds
    front_ends_us, device_us = (1e6 * sum(part) / num_requests for part in (took[:num], took[num:]))
    return {**result, "images_per_batch": images / count, "front_end_us": front_ends_us, "device_us": device_us}


def _cpu_s(process: int) -> float:
    """Processor time of all running threads of a process; Linux only."""
    seconds = 0.0
    for thread in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with suppress(OSError):  # it has ended
            seconds += int(thread.read_text().split()[0]) * 1e-9
    return seconds


def _batches(server: Server) -> tuple[float, float]:
    """The number of batches so far, and the number of images in them."""
    lines = dict(line.rsplit(" ", 1) for line in server.client.get("/metrics").text.splitlines() if line[0] != "#")
    return float(lines["diracnet_batch_images_count"]), float(lines["diracnet_batch_images_sum"])


def _median(rounds: list[dict[str, dict[str, float]]], num: str, name: str) -> float:
    return statistics.median(measured[num][name] for measured in rounds)


def _on_paper(
    device_us: tuple[float, float], rounds: list[dict[str, dict[str, float]]], cost: dict[str, Any]
) -> list[dict[str, float]]:
    """Requests/s of N front ends, if each has a core, the device process has another, and the device does nothing else.

    Front ends answer N times what one of two does in a second of its core. The device process adds to the time of the
    device what it does for a full batch from all of them.
    """
    device_batch_us = device_us[0] + MAX_BATCH * device_us[1]
    device = MAX_BATCH * 1e6 / device_batch_us
    alone, one_of_two = (1e6 / _median(rounds, num, "front_end_us") for num in ("one", "two"))
    rows = []
    for num in ON_PAPER:
        front_ends = num * one_of_two if num > 1 else alone
        added_us = cost["batch_us"] + num * cost["front_end_us"] + MAX_BATCH * cost["image_us"] if num > 1 else 0.0
        process = MAX_BATCH * 1e6 / (device_batch_us + added_us)
        answers, share = min(front_ends, process), min(front_ends, process) / min(num * alone, device)
        per_s = {"front_ends_per_s": front_ends, "device_process_per_s": process, "device_per_s": device}
        rows.append({"front_ends": num, **per_s, "answers_per_s": answers, "share": share})
    return rows


def page(record: Record) -> str:
    bars = bars_table(TITLES, {"scaling": record})
    return render("front-ends", record, bars=bars, max_batch=MAX_BATCH, num_rounds=len(record["rounds"]))


if __name__ == "__main__":
    sys.exit(run_command(command, FrontEndsConfig, examples=EXAMPLES))
