"""The nets of a race, the logits expected of every racer, their graphs, and ONNX Runtime's own profile of a graph."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.nets import PEERS, seeded_net
from bench.runtimes.page import CONVOLUTIONS
from bench.runtimes.racers import Graph, Race
from common.files import write_whole
from common.spec import Spec
from export.eight_bits.calibrate import observe, ranges
from export.eight_bits.integer import to_integer_onnx
from export.eight_bits.qdq import to_qdq_onnx
from export.graphs.graph import to_onnx
from fold.image_sets import random_images
from fold.lower import lower

NUM_COMPARED = 4
NUM_RUNS = 20  # of a profile
NUM_OBSERVED = 32  # images that set the ranges of eight bits; the weights are random, and so is what they lose
Nets = Mapping[str, nn.Sequential]  # by name, in their plain forms, float32


def make_nets(race: Race) -> tuple[Spec, Nets]:
    """The DiracNet of a race, then its peers, for the images and labels of one spec."""
    net = seeded_net(race.depth, race.width, family=race.family)
    return net.spec, {net.name: net.plain} | {name: PEERS[name](net.spec) for name in race.peers}


@torch.inference_mode()
def expected_logits(spec: Spec, nets: Nets) -> dict[str, np.ndarray]:
    """By name of the net: what every racer should answer for the first random images, by PyTorch in float32."""
    images = torch.from_numpy(random_images(spec.image, NUM_COMPARED))
    return {name: net(images).numpy() for name, net in nets.items()}


def write_graphs(spec: Spec, nets: Nets, graphs: set[Graph], folder: Path, advance: Callable[..., None]) -> None:
    """One file for each graph, into `folder`."""
    for graph in sorted(graphs):
        lowered = lower(nets[graph.net], graph.lowering)
        model = to_onnx(lowered, spec, {})
        if graph.kind != "fp32":
            reach = ranges(observe(model, random_images(spec.image, NUM_OBSERVED)), "min-max")
            is_qdq = graph.kind == "qdq"
            model = to_qdq_onnx(model, reach, precision="int8") if is_qdq else to_integer_onnx(lowered, spec, {}, reach)
        write_whole(folder / graph.file, model.SerializeToString())
        advance(note=graph.file)


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
    operators, layers = Counter(), defaultdict(list)
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
    return {"operators": dict(operators.most_common()), "layers": sorted(rows, key=lambda row: -row["ms"])}
