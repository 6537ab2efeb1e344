"""A race of runtimes: every racer in its process, opened, compared with the plain net, then timed in turn."""

import json
import operator
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.lab.page import describe_machine
from bench.lab.rounds import Failure, alternate
from bench.model import ModelConfig
from bench.nets import PEERS, PUBLISHED, count_macs, count_weights, seeded_net
from bench.runtimes.page import Column
from bench.runtimes.racers import (
    BASELINES,
    RACES,
    Graph,
    Race,
    Racer,
    Worker,
    gemm_racers,
    median_call_ms,
    peak_bytes,
    racers_of,
)
from common.files import read_whole, write_whole
from common.progress import progress
from common.spec import ImageSpec, Spec
from export.compare import TOLERANCES, compare
from export.eight_bits.calibrate import observe, ranges
from export.eight_bits.integer import to_integer_onnx
from export.eight_bits.qdq import to_qdq_onnx
from export.eight_bits.quantize import relative_error
from export.graphs.graph import to_onnx
from fold.graph import GraphNet
from fold.image_sets import random_images
from fold.lower import lower

PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "openvino", "mnn", "numpy")
NUM_COMPARED = 4
NUM_RUNS = 20  # of a profile
NUM_OBSERVED = 32  # images that set the ranges of eight bits; the weights are random, and so is what they lose
Nets = Mapping[str, GraphNet]  # by name, in their plain forms, float32


def measure(key: str, config: ModelConfig, console: Console) -> dict[str, Any]:
    """One net with all its racers: write its graphs, race, then profile the best of ONNX Runtime."""
    console.print(f"{key}: making its nets and graphs")
    spec, nets = make_nets(RACES[key])
    racers = [racer for racer in racers_of(key, name=spec.name) if _is_chosen(racer, config.rows)] + gemm_racers()
    graphs = {racer.graph for racer in racers if racer.graph}
    record = {
        "machine": describe_machine(*PACKAGES),
        "rounds": config.rounds or RACES[key].rounds,
        "round_s": config.round_s,
        "threads": list(config.threads),
        "batches": list(config.batches),
        "entrants": [_entrant(name, net, spec.image) for name, net in nets.items()],
        "rows": [_empty_row(racer) for racer in racers],
    }
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), expected_logits(spec, nets)
        with progress(console, f"{key}: graphs", len(graphs)) as advance:
            write_graphs(spec, nets, graphs, folder, advance)
        steps = len(record["threads"]) * (len(racers) + len(record["batches"]) * record["rounds"])
        with progress(console, f"{key}: race", steps) as advance:
            for num_threads in record["threads"]:
                with ExitStack() as stack:
                    workers = [stack.enter_context(closing(Worker(one.open, folder, num_threads))) for one in racers]
                    _race(workers, record, str(num_threads), expected, spec.image, advance)
        return {**record, "profiles": _profiles(record, spec, folder)}


def _is_chosen(racer: Racer, parts: Sequence[str]) -> bool:
    """The baselines of the bars always run."""
    text = f"{racer.net}, {racer.title}, {racer.precision}"
    return not parts or racer.title in BASELINES or any(part in text for part in parts)


def _entrant(name: str, net: GraphNet, image: ImageSpec) -> dict[str, Any]:
    published = PUBLISHED.get(name, "none published")
    return {"name": name, "macs": count_macs(net, image), "parameters": count_weights(net), "published": published}


def _empty_row(racer: Racer) -> dict[str, Any]:
    names = {"net": racer.net, "title": racer.title, "precision": racer.precision}
    return {**names, "failed": None, "error": None, "strays": False, "timings": {}, "peak_bytes": {}}


def _race(
    workers: list[Worker],
    record: dict[str, Any],
    threads: str,
    expected: dict[str, np.ndarray],
    image: ImageSpec,
    advance: Callable[..., None],
) -> None:
    """All racers with one number of threads: opened, compared, then timed in turn; fills the rows of the record."""
    running, images = {}, random_images(image, NUM_COMPARED)
    for worker, row in zip(workers, record["rows"], strict=True):
        row["timings"][threads] = {}
        logits = worker.wait() or worker.ask(operator.call, images)
        if isinstance(logits, Failure):
            row["failed"] = logits
        else:
            running[worker] = row
            if row["net"] in expected and not row["strays"]:  # with any number of threads
                row |= judge_logits(row["precision"], expected[row["net"]], logits)
        advance(note=row["title"])
    for size in record["batches"]:
        images = random_images(image, size)
        calls = {worker: partial(worker.ask, median_call_ms, images, record["round_s"]) for worker in running}
        timings = alternate(calls, batch_size=size, num_rounds=record["rounds"], advance=advance)
        for worker, timing in timings.items():
            row = running[worker]
            row["timings"][threads][str(size)] = "failed" if isinstance(timing, Failure) else timing
            if isinstance(timing, Failure):
                row["failed"] = timing
                del running[worker]
    for worker, row in running.items():
        if not isinstance(memory := worker.ask(peak_bytes), Failure):
            row["peak_bytes"][threads] = memory


def judge_logits(precision: str, expected: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """How far logits are from those of the plain net in float32, and whether that is beyond the tolerance.

    float32: the largest difference as a share of the largest logit; int8: see export/eight_bits/quantize.py.
    """
    if precision == "int8":
        # Classes of random weights lie too close for their agreement to mean anything.
        return {"error": relative_error(expected, logits), "strays": not np.isfinite(logits).all()}
    comparison = compare(("plain", expected), (precision, logits), tolerance=TOLERANCES[precision])
    return {"error": comparison.difference.relative, "strays": not comparison}


def make_nets(race: Race) -> tuple[Spec, Nets]:
    """The DiracNet of a race, then its peers, for the images and labels of one spec."""
    net = seeded_net(race.depth, race.width, family=race.family)
    return net.spec, {net.name: net.plain} | {name: PEERS[name](net.spec) for name in race.peers}


@torch.inference_mode()
def expected_logits(spec: Spec, nets: Nets) -> dict[str, np.ndarray]:
    """The logits of each net for the first random images, by PyTorch in float32."""
    images = torch.from_numpy(random_images(spec.image, NUM_COMPARED))
    return {name: net(images).numpy() for name, net in nets.items()}


def write_graphs(spec: Spec, nets: Nets, graphs: set[Graph], folder: Path, advance: Callable[..., None]) -> None:
    """Write each graph into a file in `folder`."""
    for graph in sorted(graphs):
        lowered = lower(nets[graph.net], graph.lowering)
        model = to_onnx(lowered, spec, {})
        if graph.kind != "fp32":
            reach = ranges(observe(model, random_images(spec.image, NUM_OBSERVED)), "min-max")
            is_qdq = graph.kind == "qdq"
            model = to_qdq_onnx(model, reach, precision="int8") if is_qdq else to_integer_onnx(lowered, spec, {}, reach)
        write_whole(folder / graph.file, model.SerializeToString())
        advance(note=graph.file)


def _profiles(record: dict[str, Any], spec: Spec, folder: Path) -> list[dict[str, Any]]:
    """ONNX Runtime's own profiles of the fastest of its racers in either precision, for the extreme batches."""
    profiles, num_threads = [], max(record["threads"])
    for precision in ("fp32", "int8"):
        for size in sorted({min(record["batches"]), max(record["batches"])}):
            timings = Column(record, num_threads, size).timings(spec.name, precision)
            titles = [title for title in timings if title.startswith("ONNX Runtime, ")]
            if titles:
                best = min(titles, key=lambda title: timings[title]["median_ms"])
                file = Graph(spec.name, best.removeprefix("ONNX Runtime, "), precision).file
                found = profile_graph(folder / file, random_images(spec.image, size), num_threads=num_threads)
                profiles.append({"title": f"{best}, {precision}", "num_threads": num_threads, **found})
    return profiles


def profile_graph(path: Path, images: np.ndarray, *, num_threads: int) -> dict[str, Any]:
    """The time of each operator in one call on `images`; ONNX Runtime's own file is written beside the graph."""
    from export.runtimes.onnx_session import quiet_session

    profiling = {"enable_profiling": True, "profile_file_prefix": str(path.with_suffix(".profile"))}
    session = quiet_session(read_whole(path), intra_op_num_threads=num_threads, **profiling)
    for _ in range(NUM_RUNS):
        session.run(None, {"images": images})
    operators = time_by_operator(json.loads(read_whole(Path(session.end_profiling()))))
    return {"batch_size": len(images), "operators": operators}


def time_by_operator(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds per call by operator, the slowest first, from the events of a profile."""
    operators = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operators[event["args"]["op_name"]] += event["dur"] / 1000 / NUM_RUNS
    return dict(operators.most_common())
