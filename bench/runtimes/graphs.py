"""The nets of a race: their graphs, the logits expected of every racer, and ONNX Runtime's own profile of a graph."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from bench.nets import PEERS, count_macs, seeded_net
from bench.runtimes.page import CONVOLUTIONS
from bench.runtimes.racers import Graph, Race, Racer
from common.files import write_whole
from common.spec import Spec
from export.compare import TOLERANCES, compare
from export.eight_bits.calibrate import observe, ranges
from export.eight_bits.integer import to_integer_onnx
from export.eight_bits.qdq import to_qdq_onnx
from export.eight_bits.quantize import relative_error
from export.graphs.graph import to_onnx
from fold.image_sets import random_images
from fold.lower import lower
from train.families import count_parameters

NUM_COMPARED = 4
NUM_RUNS = 20  # of a profile
NUM_OBSERVED = 32  # images that set the ranges of eight bits; the weights are random, and so is what they lose


@dataclass(frozen=True)
class Entrant:
    """A net of the race in its plain form, float32."""

    name: str
    plain: nn.Sequential
    spec: Spec
    published: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "macs": count_macs(self.plain, self.spec.image),
            "parameters": count_parameters(self.plain),
            "published": self.published,
        }

    @torch.inference_mode()
    def logits(self) -> np.ndarray:
        """What every racer should answer for the first random images, by PyTorch in float32."""
        return self.plain(torch.from_numpy(random_images(self.spec.image, NUM_COMPARED))).numpy()


def entrants(race: Race) -> list[Entrant]:
    """The DiracNet of a race, then its peers."""
    net = seeded_net(race.depth, race.width, family=race.family)
    peers = [Entrant(name, PEERS[name].make(net.spec), net.spec, PEERS[name].published) for name in race.peers]
    return [Entrant(net.spec.name, net.plain, net.spec, race.published), *peers]


def write_graphs(nets: Iterable[Entrant], graphs: set[Graph], folder: Path, advance: Callable[..., None]) -> None:
    """Those `graphs` of each net into `folder`."""
    for net in nets:
        for graph in sorted(graph for graph in graphs if graph.net == net.name):
            write_whole(folder / graph.file, _make(graph, net).SerializeToString())
            advance(note=graph.file)


def _make(graph: Graph, net: Entrant) -> onnx.ModelProto:
    lowered = lower(net.plain, graph.lowering)
    floats = to_onnx(lowered, net.spec, {})
    if graph.kind == "fp32":
        return floats
    reach = ranges(observe(floats, random_images(net.spec.image, NUM_OBSERVED)), "min-max")
    if graph.kind == "int8":
        return to_integer_onnx(lowered, net.spec, {}, reach)
    return to_qdq_onnx(floats, reach, precision="int8")


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


def profile_graph(path: Path, images: np.ndarray, *, num_threads: int) -> dict[str, Any]:
    """The times of all nodes for one call on `images`; ONNX Runtime's own file is written beside the graph."""
    from export.runtimes.offline import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(".profile"))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(NUM_RUNS):
        session.run(None, {"images": images})
    events = json.loads(Path(session.end_profiling()).read_text())
    return {"batch_size": len(images), **summarize(events, num_runs=NUM_RUNS)}


def summarize(events: Iterable[Mapping[str, Any]], *, num_runs: int) -> dict[str, Any]:
    """Milliseconds per call by operator, and of convolutions by weights [N_o, N_i, K, K] and output [N, N_o, H, W]."""
    operators: dict[str, float] = defaultdict(float)
    layers: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        arguments, ms = event["args"], event["dur"] / 1000 / num_runs
        operators[arguments["op_name"]] += ms
        inputs, outputs = (
            [tuple(shape) for tensor in arguments[f"{kind}_type_shape"] for shape in tensor.values()]
            for kind in ("input", "output")
        )
        # In eight bits the filters are gone into a layout of the kernel's own.
        filters = [shape for shape in inputs[1:] if len(shape) == 4]
        if arguments["op_name"] in CONVOLUTIONS and filters:
            layers[filters[0], outputs[0]].append(ms)
    rows = [
        {
            "weight": list(weight),
            "output": list(output),
            "num_layers": len(times) // num_runs,
            "ms": sum(times),
            # Every output is one product with each weight of its filter.
            "gflop_per_s": 2 * len(times) / num_runs * prod(output) * prod(weight[1:]) / sum(times) / 1e6,
        }
        for (weight, output), times in layers.items()
    ]
    return {
        "operators": dict(sorted(operators.items(), key=lambda item: -item[1])),
        "layers": sorted(rows, key=lambda row: -row["ms"]),
    }
