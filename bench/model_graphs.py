"""The nets of a race: their graphs, the logits expected of every row, and ONNX Runtime's own profile of a graph."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.model_report import CONVOLUTIONS
from bench.model_rows import INT8_LOWERINGS, RACES, RaceRow, graph_name
from bench.nets import PEERS, count_macs, seeded_net
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
from fold.lowerings import LOWERINGS
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


def entrants(key: str) -> list[Entrant]:
    """The DiracNet of a race, then its peers."""
    race = RACES[key]
    net = seeded_net(race.depth, race.width, family=race.family)
    peers = [Entrant(name, PEERS[name].make(net.spec), net.spec, PEERS[name].published) for name in race.peers]
    return [Entrant(net.spec.name, net.plain, net.spec, race.published), *peers]


def write_graphs(nets: Iterable[Entrant], files: set[str], folder: Path, advance: Callable[..., None]) -> None:
    """Those of all graphs that are among `files`, into `folder`."""
    for net in nets:
        for file, make in _graphs(net).items():
            if file in files:
                write_whole(folder / file, make().SerializeToString())
                advance(note=file)


def expected_logits(nets: Iterable[Entrant]) -> dict[str, np.ndarray]:
    """By name of the net: what every row should answer for the first random images, by PyTorch in float32."""
    with torch.inference_mode():
        return {
            net.name: net.plain(torch.from_numpy(random_images(net.spec.image, NUM_COMPARED))).numpy() for net in nets
        }


def judge_logits(row: RaceRow, expected: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """How far a row is from the plain net in float32, and whether that is beyond the tolerance of its precision.

    float32: the largest difference as a share of the largest logit; int8: see export/eight_bits/quantize.py.
    """
    comparison = compare(("plain", expected), (row.title, logits), tolerance=TOLERANCES[row.precision])
    if row.precision == "int8":
        # Classes of random weights lie too close for their agreement to mean anything.
        return {"error": relative_error(expected, logits), "strays": not np.isfinite(logits).all()}
    return {"error": comparison.difference.relative, "strays": not comparison}


def profile_graph(path: Path, images: np.ndarray, *, num_threads: int, folder: Path) -> dict[str, Any]:
    """The times of all nodes for one call on `images`; `folder` takes ONNX Runtime's own file."""
    from export.runtimes.offline import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(NUM_RUNS):
        session.run(None, {"images": images})
    events = json.loads(Path(session.end_profiling()).read_text())
    return {"batch_size": len(images), **summarize(events, num_runs=NUM_RUNS)}


def summarize(events: Iterable[Mapping[str, Any]], *, num_runs: int) -> dict[str, Any]:
    """Milliseconds per call by operator, and of convolutions by weights [N_o, N_i, K, K] and output [N, N_o, H, W]."""
    operators: dict[str, float] = defaultdict(float)
    shapes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        arguments, ms = event["args"], event["dur"] / 1000 / num_runs
        operators[arguments["op_name"]] += ms
        shape = _convolution(arguments) if arguments["op_name"] in CONVOLUTIONS else None
        if shape:
            shapes[shape].append(ms)
    layers = [
        {
            "weight": list(weight),
            "output": list(output),
            "num_layers": len(times) // num_runs,
            "ms": sum(times),
            # Every output is one product with each weight of its filter.
            "gflop_per_s": 2 * len(times) / num_runs * prod(output) * prod(weight[1:]) / sum(times) / 1e6,
        }
        for (weight, output), times in shapes.items()
    ]
    return {
        "operators": dict(sorted(operators.items(), key=lambda item: -item[1])),
        "layers": sorted(layers, key=lambda layer: -layer["ms"]),
    }


def _graphs(net: Entrant) -> dict[str, Callable[[], Any]]:
    """By name of the file: what makes its graph."""

    def floats(lowering: str) -> Any:
        return to_onnx(lower(net.plain, lowering), net.spec, {})

    def integer(lowering: str) -> Any:
        return to_integer_onnx(lower(net.plain, lowering), net.spec, {}, _ranges(floats(lowering), net.spec))

    def qdq(lowering: str) -> Any:
        return to_qdq_onnx(floats(lowering), _ranges(floats(lowering), net.spec), precision="int8")

    made = [("fp32", floats, low) for low in LOWERINGS] + [("int8", integer, low) for low in INT8_LOWERINGS]
    made.append(("qdq", qdq, "concat"))
    return {graph_name(net.name, low, kind): partial(make, low) for kind, make, low in made}


def _ranges(floats: Any, spec: Spec) -> Any:
    return ranges(observe(floats, random_images(spec.image, NUM_OBSERVED)), "min-max")


def _convolution(arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(filters, output); None where the filters are gone into a layout of the kernel's own, as in eight bits."""
    inputs, outputs = (_shapes(arguments[f"{kind}_type_shape"]) for kind in ("input", "output"))
    filters = [shape for shape in inputs[1:] if len(shape) == 4]
    return (filters[0], outputs[0]) if filters else None


def _shapes(tensors: Iterable[Mapping[str, list[int]]]) -> list[tuple[int, ...]]:
    return [tuple(shape) for tensor in tensors for shape in tensor.values()]
