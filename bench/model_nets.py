"""What the processes of a race read: the graphs of its nets, and the logits that they should answer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.macs import count_macs
from bench.model_rows import INT8_LOWERINGS, RACES, Row, graph_name
from bench.nets import Net, seeded_net
from bench.other_nets import PEERS, PUBLISHED
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
    net: Net = seeded_net(race.depth, race.width, family=race.family)
    peers = [Entrant(name, PEERS[name].make(net.spec), net.spec, PEERS[name].published) for name in race.peers]
    return [Entrant(net.spec.name, net.plain, net.spec, PUBLISHED[key]), *peers]


def write_graphs(nets: Iterable[Entrant], files: set[str], folder: Path, advance: Callable[..., None]) -> None:
    """Those of all graphs that are among `files`, into `folder`."""
    for net in nets:
        graphs = _float_graphs(net) | _int8_graphs(net)
        for file, make in graphs.items():
            if file in files:
                write_whole(folder / file, make().SerializeToString())
                advance(note=file)


def expected_logits(nets: Iterable[Entrant]) -> dict[str, np.ndarray]:
    """By name of the net: what every row should answer for the first random images, by PyTorch in float32."""
    with torch.inference_mode():
        return {
            net.name: net.plain(torch.from_numpy(random_images(net.spec.image, NUM_COMPARED))).numpy() for net in nets
        }


def judge_logits(row: Row, expected: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """How far a row is from the plain net in float32, and whether that is beyond the tolerance of its precision.

    float32: the largest difference as a share of the largest logit; int8: see export/eight_bits/quantize.py.
    """
    comparison = compare(("plain", expected), (row.title, logits), tolerance=TOLERANCES[row.precision])
    if row.precision == "int8":
        # Classes of random weights lie too close for their agreement to mean anything.
        return {"error": relative_error(expected, logits), "strays": not np.isfinite(logits).all()}
    return {"error": comparison.relative, "strays": not comparison}


def _float_graphs(net: Entrant) -> dict[str, Callable[[], Any]]:
    return {
        graph_name(net.name, lowering): lambda lowering=lowering: to_onnx(lower(net.plain, lowering), net.spec, {})
        for lowering in LOWERINGS
    }


def _int8_graphs(net: Entrant) -> dict[str, Callable[[], Any]]:
    def integer(lowering: str) -> Any:
        lowered = lower(net.plain, lowering)
        return to_integer_onnx(lowered, net.spec, {}, _ranges(to_onnx(lowered, net.spec, {}), net.spec))

    def qdq() -> Any:
        floats = to_onnx(lower(net.plain, "concat"), net.spec, {})
        return to_qdq_onnx(floats, _ranges(floats, net.spec), precision="int8")

    made = {graph_name(net.name, low, "int8"): lambda low=low: integer(low) for low in INT8_LOWERINGS}
    return made | {graph_name(net.name, "concat", "qdq"): qdq}


def _ranges(floats: Any, spec: Spec) -> Any:
    return ranges(observe(floats, random_images(spec.image, NUM_OBSERVED)), "min-max")
