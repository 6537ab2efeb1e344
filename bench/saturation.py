"""python bench/saturation.py PLAIN: what each bound against 16-bit saturation costs an eight-bit net."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from common.cli import run_command
from common.refusal import Refusal
from common.spec import Published
from export.runtimes.saturation import largest_pair

Bound = Callable[[np.ndarray], np.ndarray]  # filters [N_o, C, kh, kw] → range of 127 steps, [N_o]
EXAMPLES = ("python bench/saturation.py runs/model/plain.safetensors     # five minutes on two cores",)


@dataclass(frozen=True)
class SaturationConfig:
    plain: Annotated[Path, "plain net of fold/run.py"]
    dataset: Annotated[Published, "data set it was trained on"] = "fashion-mnist"
    data_dir: Annotated[Path | None, "folder of the data set"] = None
    lowering: Annotated[str, "form of the filters"] = "concat"
    images: Annotated[int, "training images that set the ranges"] = 512


def command(config: SaturationConfig) -> None:
    """Quantise a net under each bound and compare it with float32 on the whole test split, as a Markdown table."""
    from export.compare import answer_all
    from export.eight_bits import integer
    from export.eight_bits.calibrate import observe, ranges
    from export.eight_bits.quantize import answerer, measure_drop
    from export.graphs.graph import to_onnx
    from export.runtimes.saturation import saturates
    from fold.lower import lower
    from fold.plain import load_plain
    from train.data import datasets

    plain, dataset = load_plain(config.plain), datasets.load(config.dataset, data_dir=config.data_dir)
    trained_on = plain.provenance.get("training", {}).get("dataset")
    if trained_on != config.dataset:
        wrong = f"{config.plain} was trained on {trained_on}, not on {config.dataset}"
        raise Refusal(f"{wrong}: choose its data set with --dataset")
    lowered = lower(plain.net, config.lowering)
    floats = to_onnx(lowered, plain.spec, {})
    order = np.random.default_rng(0).permutation(len(dataset.train))[: config.images]
    reach = ranges(observe(floats, dataset.train.take(order).first(len(order))), "min-max")
    pixels, targets = dataset.test.first(len(dataset.test)), np.asarray(dataset.test.targets)
    reference = answer_all(answerer(floats), pixels)
    print(f"this processor {'saturates' if saturates() else 'does not saturate'}")
    print("| bound | filters with a larger scale | top-1 | same class | logit error |\n| --- | --- | --- | --- | --- |")
    for name, bound in BOUNDS.items():
        is_widened: list[bool] = []
        with patch.object(integer, "quantize_filters", partial(quantize_under, bound, is_widened)):
            model = integer.to_integer_onnx(lowered, plain.spec, {}, reach)
        drop = measure_drop(reference, answer_all(answerer(model), pixels), targets)
        shares = (drop.accuracy, drop.top1_agreement, drop.relative_error)
        cells = [name, f"{100 * np.mean(is_widened):.0f} %", *(f"{100 * share:.2f} %" for share in shares)]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"| float32 | | {100 * drop.float32_accuracy:.2f} % | | |")


def largest(filters: np.ndarray) -> np.ndarray:
    return np.abs(filters).max(axis=(1, 2, 3))


def side_by_side(filters: np.ndarray) -> np.ndarray:
    """Two input channels of one tap, in the kernel's order: taps outermost, channels innermost."""
    rows = np.moveaxis(filters, 1, -1).reshape(len(filters), -1)
    pairs = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(len(rows), -1, 2)
    signed = [part.clip(0).sum(axis=2).max(axis=1) for part in (pairs, -pairs)]
    return np.maximum.reduce([*signed, largest(filters)])


def permuted(filters: np.ndarray) -> np.ndarray:
    """`side_by_side` after a greedy permutation: next to each channel the one that widens all filters least."""
    left, order = list(range(filters.shape[1])), []
    while left:
        channel = left.pop(0)
        order.append(channel)
        if left:
            cost = [(side_by_side(filters[:, [channel, other]]) / largest(filters).clip(1e-30)).sum() for other in left]
            order.append(left.pop(int(np.argmin(cost))))
    return side_by_side(filters[:, order])


BOUNDS: dict[str, Bound] = {
    "none (saturates without VNNI)": largest,
    "pairs side by side in the kernel": side_by_side,
    "the same, channels permuted": permuted,
    "any two weights of a filter": lambda filters: largest_pair(filters.reshape(len(filters), -1)),
    "seven bits": lambda filters: largest(filters) * 127 / 63,
}


def quantize_under(bound: Bound, is_widened: list[bool], weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`quantize_filters` of export/eight_bits/integer.py under another bound; adds which filters scale up for it."""
    needed = bound(weight.astype(np.float64))
    is_widened += (needed > 1.0001 * largest(weight)).tolist()
    scales = np.where(needed > 0, needed / 127, 1).astype(np.float32)
    return np.rint(weight / scales.reshape(-1, 1, 1, 1)).clip(-127, 127).astype(np.int8), scales


if __name__ == "__main__":
    sys.exit(run_command(command, SaturationConfig, examples=EXAMPLES))
