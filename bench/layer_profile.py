"""Where ONNX Runtime spends its time on a graph: its own profile, by operator and by shape of convolution."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

NUM_RUNS = 20
CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv")
LAYOUTS = ("ReorderInput", "ReorderOutput", "Transpose")


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


def _convolution(arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(filters, output); None where the filters are gone into a layout of the kernel's own, as in eight bits."""
    inputs, outputs = (_shapes(arguments[f"{kind}_type_shape"]) for kind in ("input", "output"))
    filters = [shape for shape in inputs[1:] if len(shape) == 4]
    return (filters[0], outputs[0]) if filters else None


def _shapes(tensors: Iterable[Mapping[str, list[int]]]) -> list[tuple[int, ...]]:
    return [tuple(shape) for tensor in tensors for shape in tensor.values()]
