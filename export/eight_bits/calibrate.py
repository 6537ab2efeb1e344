"""The values of a graph's tensors: whether float16 holds them, and the ranges that eight bits should cover."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.compare import BATCH_SIZE
from export.runtimes.onnx_session import quiet_session

METHODS = ("min-max", "percentile", "entropy")
NUM_BINS = 2048
LEVELS = 255
# The share of all values that percentile covers; the rest is clipped, half of it at either end.
COVERED = 0.9999
CANDIDATES = np.linspace(0.25, 1.0, 61)  # shares of the whole range among which entropy looks for the best

Range = tuple[float, float]  # the lowest and the highest value that is not clipped; 0 is always between them
Ranges = Mapping[str, Range]  # by the name of a tensor in the float graph


@dataclass(frozen=True)
class Histogram:
    """How often a tensor's values fall into `NUM_BINS` bins of equal width between `low` and `high`."""

    low: float
    high: float
    counts: np.ndarray


def observer(
    model: onnx.ModelProto, names: Sequence[str], **options: Any
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """From a graph's input to its tensors `names`, across which a runtime no longer fuses; `options` of the session."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    inner = {*names} - {output.name for output in model.graph.output}
    observed.graph.output.extend(map(helper.make_empty_tensor_value_info, sorted(inner)))
    session = quiet_session(observed.SerializeToString(), **options)
    input_name = session.get_inputs()[0].name
    return lambda x: dict(zip(names, map(np.asarray, session.run(list(names), {input_name: x})), strict=True))


def first_overflow(model: onnx.ModelProto, x: np.ndarray, folder: Path | None = None) -> str | None:
    """The first node whose float16 output is not finite for the graph's input `x`, or None.

    Kernels of the CPU keep float32 between nodes; as an output of the graph, every tensor is rounded to float16, which
    is infinite beyond 65,504. `folder` holds the weights that are not in the model.
    """
    typed = onnx.shape_inference.infer_shapes(model).graph
    halves = {value.name for value in typed.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    nodes = {name: node.name or name for node in model.graph.node for name in node.output if name in halves}
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    size = fixed or BATCH_SIZE
    end = len(x) // fixed * fixed if fixed else len(x)  # images that do not fill a fixed batch are left out
    observe = observer(model, [*nodes], weights_folder=folder)
    values = (pair for start in range(0, end, size) for pair in observe(x[start : start + size]).items())
    return next((nodes[name] for name, value in values if not np.isfinite(value).all()), None)


def observe(
    model: onnx.ModelProto, images: np.ndarray, *, batch_size: int = 32, advance: Callable[[int], None] = lambda n: None
) -> dict[str, Histogram]:
    """A histogram of every float tensor that a node of `model` gives, by name, on images uint8 [N, H, W, C].

    Two passes over the images: the first finds the ends of the bins. `advance` is called with the number of images
    after each batch, 2 N in all.
    """
    names = [name for node in model.graph.node for name in node.output if name != "logits"]
    run = observer(model, names)
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    ends: dict[str, Range] = dict.fromkeys(names, (0.0, 0.0))
    for batch in batches:
        for name, values in run(batch).items():
            low, high = ends[name]
            ends[name] = (min(low, float(values.min())), max(high, float(values.max())))
        advance(len(batch))
    bins = {name: (low, high if high > low else low + 1.0) for name, (low, high) in ends.items()}  # even if all are 0
    found = {name: Histogram(*bins[name], np.zeros(NUM_BINS, np.int64)) for name in names}
    for batch in batches:
        for name, values in run(batch).items():
            found[name].counts[:] += np.histogram(values, NUM_BINS, bins[name])[0]
        advance(len(batch))
    return found


def covered(histogram: Histogram, method: str) -> Range:
    """The range that `method`, one of METHODS, covers.

    min-max: everything seen. percentile: all but one value in 10,000. entropy: the range whose quantised distribution
    loses least information, measured by the Kullback-Leibler divergence.
    """
    low, high = histogram.low, histogram.high
    match method:
        case "min-max":
            return low, high
        case "percentile":
            cumulative = np.cumsum(histogram.counts) / histogram.counts.sum()
            edges = np.linspace(low, high, NUM_BINS + 1)
            first = int(np.searchsorted(cumulative, (1 - COVERED) / 2, side="right"))
            last = int(np.searchsorted(cumulative, (1 + COVERED) / 2))
            return min(0.0, float(edges[first])), max(0.0, float(edges[last + 1]))
        case "entropy":
            share = min(CANDIDATES[::-1], key=lambda share: _information_lost(histogram, share))
            return share * low, share * high
    raise ValueError(f"{method} is none of {METHODS}")


def ranges(histograms: Mapping[str, Histogram], method: str) -> dict[str, Range]:
    """`covered` for many tensors."""
    return {name: covered(histogram, method) for name, histogram in histograms.items()}


def _information_lost(histogram: Histogram, share: float) -> float:
    """KL(P || Q): P is the distribution clipped to `share` of the range, Q the same in LEVELS steps.

    The bin at 0 is left out: a ReLU piles up there values that eight bits hold exactly, and its peak would ask for
    narrow levels, whatever they clip.
    """
    counts = histogram.counts.copy()
    centres = histogram.low + (np.arange(NUM_BINS) + 0.5) * (histogram.high - histogram.low) / NUM_BINS
    counts[np.abs(centres).argmin()] = 0
    if not counts.any():
        return 0.0
    inside = np.flatnonzero((centres >= share * histogram.low) & (centres <= share * histogram.high))
    first, last = inside[0], inside[-1]
    p = counts[first : last + 1].astype(np.float64)
    kept = p > 0
    level = np.arange(len(p)) * LEVELS // len(p)
    # A level spreads its count evenly over those of its bins that hold anything.
    q = np.bincount(level, p, LEVELS)[level] / np.maximum(np.bincount(level, kept, LEVELS)[level], 1)
    p[0] += counts[:first].sum()
    p[-1] += counts[last + 1 :].sum()
    kept = (p > 0) & (q > 0)
    total_p, total_q = p.sum(), q[kept].sum()
    lost = p[(p > 0) & ~kept].sum() / total_p  # clipped into a bin that is empty
    p, q = p[kept] / total_p, q[kept] / total_q
    return float((p * np.log(p / q)).sum() + lost * np.log(NUM_BINS))
