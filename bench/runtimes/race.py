"""A race of runtimes: every racer in its process, opened, compared with the plain net, then timed in turn."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from bench.lab.page import describe_machine
from bench.lab.rounds import Timing, alternate
from bench.nets import PUBLISHED, count_macs
from bench.runtimes.graphs import NUM_COMPARED, expected_logits, make_nets, profile_graph, write_graphs
from bench.runtimes.page import Column
from bench.runtimes.racers import BASELINES, RACES, Graph, Racer, gemm_racers, racers_of
from bench.runtimes.worker import Worker, WorkerFailed, logits_of, median_call_ms, peak_bytes
from common.progress import progress
from common.spec import ImageSpec, Spec
from export.compare import TOLERANCES, compare
from export.eight_bits.quantize import relative_error
from fold.image_sets import random_images
from train.families import count_parameters

if TYPE_CHECKING:
    from rich.console import Console

    from bench.model import ModelConfig

PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "openvino", "mnn", "numpy")


def measure(key: str, config: "ModelConfig", console: "Console") -> dict[str, Any]:
    """One net with all its racers: write its graphs, race, then profile the best of ONNX Runtime."""
    console.print(f"{key}: making its nets and graphs")
    spec, nets = make_nets(RACES[key])
    config = replace(config, rounds=config.rounds or RACES[key].rounds)
    racers = [racer for racer in racers_of(key, name=spec.name) if _is_chosen(racer, config.rows)] + gemm_racers()
    graphs = {racer.graph for racer in racers if racer.graph}
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), expected_logits(spec, nets)
        with progress(console, f"{key}: graphs", len(graphs)) as advance:
            write_graphs(spec, nets, graphs, folder, advance)
        steps = len(config.threads) * (len(racers) + len(config.batches) * config.rounds)
        with progress(console, f"{key}: race", steps) as advance:
            for num_threads in config.threads:
                with ExitStack() as stack:
                    workers = {
                        racer: stack.enter_context(closing(Worker(racer.open, folder, spec.image, num_threads)))
                        for racer in racers
                    }
                    _race(workers, expected, str(num_threads), config, advance)
        record = {
            "machine": describe_machine(*PACKAGES),
            "rounds": config.rounds,
            "round_s": config.round_s,
            "threads": list(config.threads),
            "batches": list(config.batches),
            "entrants": [_entrant(name, net, spec.image) for name, net in nets.items()],
            "rows": [racer.to_dict() for racer in racers],
        }
        return {**record, "profiles": _profiles(record, spec, folder)}


def _entrant(name: str, net: nn.Module, image: ImageSpec) -> dict[str, Any]:
    published = PUBLISHED.get(name, "none published")
    return {"name": name, "macs": count_macs(net, image), "parameters": count_parameters(net), "published": published}


def _is_chosen(racer: Racer, parts: Sequence[str]) -> bool:
    """Those that bars are stated against always run."""
    text = f"{racer.net}, {racer.title}, {racer.precision}"
    return not parts or racer.title in BASELINES or any(part in text for part in parts)


def _race(
    workers: dict[Racer, Worker],
    expected: dict[str, np.ndarray],
    threads: str,
    config: "ModelConfig",
    advance: Callable[..., None],
) -> None:
    """All racers with one number of threads: open, compare, time."""
    running = {}
    for racer, worker in workers.items():
        racer.timings[threads] = {}
        try:
            worker.wait()
            logits = worker.ask(logits_of, NUM_COMPARED)
        except WorkerFailed as failure:
            racer.failed = str(failure)
        else:
            running[racer] = worker
            if racer.net in expected:
                judge_logits(racer, expected[racer.net], logits)
        advance(note=racer.title)
    for size in config.batches:
        calls = {racer: partial(one.ask, median_call_ms, size, config.round_s) for racer, one in running.items()}
        for racer, timing in alternate(calls, batch_size=size, num_rounds=config.rounds, advance=advance).items():
            if isinstance(timing, Timing):
                racer.timings[threads][str(size)] = timing.to_dict()
            else:
                racer.timings[threads][str(size)], racer.failed = "failed", timing.reason
                del running[racer]
    for racer, worker in running.items():
        racer.peak_bytes[threads] = worker.ask(peak_bytes)


def judge_logits(racer: Racer, expected: np.ndarray, logits: np.ndarray) -> None:
    """Record how far a racer is from the plain net in float32, and whether it is beyond its precision's tolerance.

    float32: the largest difference as a share of the largest logit; int8: see export/eight_bits/quantize.py.
    """
    if racer.precision == "int8":
        # Classes of random weights lie too close for their agreement to mean anything.
        racer.error, racer.strays = relative_error(expected, logits), not np.isfinite(logits).all()
    else:
        comparison = compare(("plain", expected), (racer.title, logits), tolerance=TOLERANCES[racer.precision])
        racer.error, racer.strays = comparison.relative, not comparison


def _profiles(record: dict[str, Any], spec: Spec, folder: Path) -> list[dict[str, Any]]:
    """ONNX Runtime's own profiles of the fastest of its racers in either precision, for the extreme batches."""
    profiles, num_threads = [], max(record["threads"])
    for precision in ("fp32", "int8"):
        for size in sorted({min(record["batches"]), max(record["batches"])}):
            timings = Column(record, num_threads, size).timings(spec.name, precision)
            titles = [title for title in timings if title.startswith("ONNX Runtime, ")]
            if titles:
                best = min(titles, key=lambda title: timings[title].median_ms)
                file = Graph(spec.name, best.removeprefix("ONNX Runtime, "), precision).file
                found = profile_graph(folder / file, random_images(spec.image, size), num_threads=num_threads)
                profiles.append({"title": f"{best}, {precision}", "num_threads": num_threads, **found})
    return profiles
