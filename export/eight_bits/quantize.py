"""From a plain net to eight bits: the lowering and ranges that lose least, and their cost in accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from common.difference import share
from common.interval import Z_TWO, interval
from common.refusal import Refusal
from common.spec import Spec
from export.compare import ALLOWED_DROP, INT8_AGREEMENT, Answer, answer_all
from export.eight_bits.calibrate import METHODS, observe, ranges
from export.eight_bits.integer import eight_bit_part, to_integer_onnx
from export.eight_bits.qdq import to_qdq_onnx
from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import ort, quiet_session
from fold.graph import GraphNet
from fold.lower import is_chain, lower

Target = Literal["onnxruntime", "tensorrt"]
# Lowerings tried by default. The others quantise no better: shared and shared-split hold W1 - W2, whose range is wider
# than that of either.
TRIED = ("skip", "concat")


@dataclass(frozen=True)
class Candidate:
    """One way to eight bits, and how far its logits are from float32's on the images that choose."""

    lowering: str
    method: str  # of export/eight_bits/calibrate.py
    relative_error: float  # see `relative_error`
    top1_agreement: float  # share of images that keep their class


@dataclass(frozen=True)
class Drop:
    """The cost of eight bits on test images; true if accuracy and classes are kept as parity demands."""

    num_images: int
    float32_accuracy: float
    accuracy: float  # top-1, as float32's
    top1_agreement: float  # share of images that keep their class
    relative_error: float
    # The share of the images that was lost lies between these with 95 % certainty.
    lost_low: float
    lost_high: float

    def __bool__(self) -> bool:
        return self.float32_accuracy - self.accuracy <= ALLOWED_DROP and self.top1_agreement >= INT8_AGREEMENT


def quantize(
    net: GraphNet,
    spec: Spec,
    *,
    precision: Literal["int8", "fp8"],
    target: Target,
    lowerings: Sequence[str],
    observed: np.ndarray,
    chosen_by: np.ndarray,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[onnx.ModelProto, list[Candidate]]:
    """The eight-bit graph of a plain net whose logits stray least from float32's, and all tried, the best first.

    Ranges are those of the images `observed`, the choice is made on `chosen_by`, both uint8 [N, H, W, C].
    """
    if target == "onnxruntime" and precision != "int8":
        raise Refusal(f"{precision} is for TensorRT: add --target tensorrt; ONNX Runtime's CPU kernels have only int8")
    is_integer = target == "onnxruntime" and is_chain(net.graph) and bool(eight_bit_part(net.graph))
    reference = answer_all(answerer(to_onnx(net, spec, {})), chosen_by, advance)
    tried: list[tuple[Candidate, onnx.ModelProto]] = []
    for lowering in lowerings:
        lowered = lower(net, lowering)
        floats = to_onnx(lowered, spec, {})
        histograms = observe(floats, observed, advance=advance)
        for method in METHODS:
            reach = ranges(histograms, method)
            if is_integer:
                model = to_integer_onnx(lowered, spec, {}, reach)
            else:
                model = to_qdq_onnx(floats, reach, precision=precision, for_onnxruntime=target == "onnxruntime")
            logits = answer_all(answerer(model), chosen_by, advance)
            error, agreement = relative_error(reference, logits), top1_agreement(reference, logits)
            tried.append((Candidate(lowering, method, error, agreement), model))
    tried.sort(key=lambda pair: pair[0].relative_error)
    return tried[0][1], [candidate for candidate, _ in tried]


def num_images_run(lowerings: Sequence[str], num_observed: int, num_chosen_by: int) -> int:
    """How many images `quantize` runs in all, for its progress."""
    return num_chosen_by + len(lowerings) * (2 * num_observed + len(METHODS) * num_chosen_by)


def measure_drop(reference: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> Drop:
    """Float32's logits and eight bits' [N, K] on the same labelled test images."""
    before, after = (part.argmax(1) == targets for part in (reference, logits))
    # Lost are those that turned wrong less those that turned right. Each share lies between the ends of its own
    # interval of 97.5 %, so that both do with 95 % certainty (Bonferroni).
    wrong, right = (interval(int(turned.sum()), len(before), z=Z_TWO) for turned in (before & ~after, after & ~before))
    return Drop(
        num_images=len(targets),
        float32_accuracy=float(before.mean()),
        accuracy=float(after.mean()),
        top1_agreement=top1_agreement(reference, logits),
        relative_error=relative_error(reference, logits),
        lost_low=wrong[0] - right[1],
        lost_high=wrong[1] - right[0],
    )


def relative_error(reference: np.ndarray, logits: np.ndarray) -> float:
    """Root mean square of the difference as a share of the logits', both without their mean over classes.

    A value common to all classes of an image changes no probability.
    """
    before, after = (part - part.mean(axis=1, keepdims=True) for part in (reference, logits))
    return share(*(float(np.sqrt((part**2).mean())) for part in (after - before, before)))


def top1_agreement(reference: np.ndarray, logits: np.ndarray) -> float:
    return float((reference.argmax(1) == logits.argmax(1)).mean())


def answerer(model: onnx.ModelProto) -> Answer:
    """Images → logits through ONNX Runtime on the CPU."""
    levels, kinds = ort.GraphOptimizationLevel, {tensor.data_type for tensor in model.graph.initializer}
    # Its optimiser moves fp8 pairs over nodes that then answer wrongly (1.31: errors of 70 %).
    level = levels.ORT_DISABLE_ALL if onnx.TensorProto.FLOAT8E4M3FN in kinds else levels.ORT_ENABLE_ALL
    session = quiet_session(model.SerializeToString(), graph_optimization_level=level)
    return lambda images: np.asarray(session.run(None, {"images": images})[0])
