"""A race of runtimes: every racer in its process, opened, compared with the plain net, then timed in turn."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.page import describe_machine
from bench.rounds import Timing, alternate
from bench.runtimes.graphs import NUM_COMPARED, Entrant, entrants, judge_logits, profile_graph, write_graphs
from bench.runtimes.racers import BASELINES, RACES, Racer, gemm_racers, racers_of
from bench.runtimes.worker import Worker, WorkerFailed, logits_of, median_call_ms, peak_bytes
from common.progress import progress
from fold.image_sets import random_images

if TYPE_CHECKING:
    from rich.console import Console

    from bench.model import ModelConfig

PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "openvino", "mnn", "numpy")


def measure(key: str, config: "ModelConfig", console: "Console") -> dict[str, Any]:
    """One net with all its racers: write its graphs, race, then profile the best of ONNX Runtime."""
    console.print(f"{key}: making its nets and graphs")
    nets, num_rounds = entrants(RACES[key]), config.rounds or RACES[key].rounds
    racers = [racer for racer in racers_of(key, name=nets[0].name) if _is_chosen(racer, config.rows)] + gemm_racers()
    graphs = {racer.graph for racer in racers if racer.graph}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with progress(console, f"{key}: graphs", len(graphs)) as advance:
            write_graphs(nets, graphs, folder, advance)
        steps = len(config.threads) * (len(racers) + len(config.batches) * num_rounds)
        with progress(console, f"{key}: race", steps) as advance:
            for num_threads in config.threads:
                _race(racers, nets, folder, config, (num_threads, num_rounds), advance)
        profiles = _profiles(racers, nets[0], folder, max(config.threads), config.batches)
    return {
        "machine": describe_machine(*PACKAGES),
        "rounds": num_rounds,
        "round_s": config.round_s,
        "threads": list(config.threads),
        "batches": list(config.batches),
        "entrants": [net.to_dict() for net in nets],
        "rows": [racer.to_dict() for racer in racers],
        "profiles": profiles,
    }


def _is_chosen(racer: Racer, parts: Sequence[str]) -> bool:
    """Those that bars are stated against always run."""
    text = f"{racer.net}, {racer.title}, {racer.precision}"
    return not parts or racer.title in BASELINES or any(part in text for part in parts)


def _race(
    racers: list[Racer],
    nets: list[Entrant],
    folder: Path,
    config: "ModelConfig",
    threads_and_rounds: tuple[int, int],
    advance: Callable[..., None],
) -> None:
    """All racers with one number of threads: open, compare, time."""
    num_threads, num_rounds = threads_and_rounds
    key, expected = str(num_threads), {net.name: net.logits() for net in nets}
    workers = {racer: Worker(racer.open, folder, nets[0].spec.image, num_threads=num_threads) for racer in racers}
    try:
        running = {}
        for racer, worker in workers.items():
            racer.timings[key] = {}
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
            for racer, timing in alternate(calls, batch_size=size, num_rounds=num_rounds, advance=advance).items():
                if isinstance(timing, Timing):
                    racer.timings[key][str(size)] = timing.to_dict()
                else:
                    racer.timings[key][str(size)], racer.failed = "failed", timing.reason
                    del running[racer]
        for racer, worker in running.items():
            racer.peak_bytes[key] = worker.ask(peak_bytes)
    finally:
        for worker in workers.values():
            worker.close()


def _profiles(
    racers: list[Racer], net: Entrant, folder: Path, num_threads: int, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """ONNX Runtime's own profiles of the fastest of its racers in either precision, for the extreme batches."""
    profiles = []
    for precision in ("fp32", "int8"):
        for size in sorted({min(batches), max(batches)}):
            times_ms = {
                racer: timing["median_ms"]
                for racer in racers
                if racer.title.startswith("ONNX Runtime") and (racer.net, racer.precision) == (net.name, precision)
                if isinstance(timing := racer.timings[str(num_threads)].get(str(size)), dict)
            }
            best = min(times_ms, key=times_ms.__getitem__, default=None)
            if best and best.graph:
                images = random_images(net.spec.image, size)
                found = profile_graph(folder / best.graph.file, images, num_threads=num_threads)
                profiles.append({"title": f"{best.title}, {precision}", "num_threads": num_threads, **found})
    return profiles
