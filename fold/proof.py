"""The proof that folding changed nothing, in numbers."""

from collections.abc import Callable, Container, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fold.plain import named_layers

# Folding reorders a few hundred roundings of 2^-53 per layer, which leaves 1e-15 to 1e-13 of the output;
# a wrong fold changes its first digits. Anything between the two is a bug.
FLOAT64_TOLERANCE = 1e-9
# Roundings of 2^-24 in sums of n terms over L layers add up to about sqrt(L n) 2^-24 of the output: 2e-5
# for 34 layers of 2,304 terms, 5e-5 for 400 layers; twice that is allowed.
FLOAT32_TOLERANCE = 1e-4
BATCH_SIZE = 100


@dataclass(frozen=True)
class Difference:
    """Two answers to the same images: the largest difference, and the same as a share of the largest output."""

    what: str  # "logits" or a layer's name
    images: str  # "random" or "real"
    precision: str  # "float64" or "float32"
    num_images: int
    max_abs: float
    relative: float
    top1_changes: int  # images whose class changes by more than the tolerance explains


@dataclass(frozen=True)
class Proof:
    """True where every difference is within tolerance; carries all of them."""

    ends: tuple[Difference, ...]
    layers: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return not self.failures()

    def failures(self) -> list[str]:
        """A clause for each difference beyond tolerance; NaN is beyond it."""
        return [
            f"{end.precision} logits on {end.images} images differ by {end.relative:.1e} (tolerance "
            f"{_tolerance(end.precision):.0e}), top-1 on {end.top1_changes} of {end.num_images}"
            for end in self.ends
            if not end.relative <= _tolerance(end.precision) or end.top1_changes
        ]

    def to_dict(self) -> dict[str, Any]:
        return {"logits": [asdict(end) for end in self.ends], "layers": [asdict(row) for row in self.layers]}


def prove(
    net: nn.Sequential,
    plain: nn.Sequential,
    image_sets: dict[str, Tensor],
    *,
    advance: Callable[[int], None] = lambda n: None,
) -> Proof:
    """Compare a Dirac net and its plain float64 form on uint8 images [N, H, W, C], named by kind.

    In float64 and float32: every layer with weights on the first batch of each set, logits on all images.
    """
    nets = {
        "float64": (deepcopy(net).double().eval(), plain),
        "float32": (net.eval(), deepcopy(plain).float()),
    }
    ends: list[Difference] = []
    layers: list[Difference] = []
    for kind, images in image_sets.items():
        for precision, (dirac, folded) in nets.items():
            layers += _compare_layers(dirac, folded, images[:BATCH_SIZE], kind, precision)
            ends.append(_compare_logits(dirac, folded, images, kind, precision, advance))
    return Proof(tuple(ends), tuple(layers))


@torch.no_grad()
def _compare_logits(
    dirac: nn.Module,
    plain: nn.Module,
    images: Tensor,
    kind: str,
    precision: str,
    advance: Callable[[int], None],
) -> Difference:
    reference: list[Tensor] = []
    logits: list[Tensor] = []
    for batch in torch.split(images, BATCH_SIZE):
        reference.append(dirac(batch).double())
        logits.append(plain(batch).double())
        advance(len(batch))
    before, after = torch.cat(reference), torch.cat(logits)
    scale = before.abs().max().item()
    # A class that the reference itself puts within the tolerance of the best one is a tie, not a change.
    chosen = before.gather(1, after.argmax(1, keepdim=True))
    behind = before.max(1, keepdim=True).values - chosen
    changes = int((behind > 2 * _tolerance(precision) * scale).sum())
    return _difference("logits", before, after, kind, precision, changes)


@torch.no_grad()
def _compare_layers(
    dirac: nn.Sequential, plain: nn.Sequential, images: Tensor, kind: str, precision: str
) -> Iterator[Difference]:
    names = weighted_layers(plain)
    before, after = layer_outputs(dirac, images, names), layer_outputs(plain, images, names)
    for name in names:
        yield _difference(name, before[name], after[name], kind, precision, 0)


def weighted_layers(plain: nn.Sequential) -> list[str]:
    """Names of the layers with weights, in the order in which they run."""
    return [name for name, layer in named_layers(plain) if list(layer.parameters())]


def layer_outputs(net: nn.Sequential, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The outputs of the layers that a plain net calls `names`, of that net or of the Dirac net before it.

    A convolution that took in the batch normalisation after it has the output of the latter.
    """
    outputs, x = {}, images
    for name, layer in named_layers(net):
        x = outputs[name] = layer(x)
    replaced = _batch_norms(net, kept=names)
    return {name: outputs[replaced.get(name, name)] for name in names}


def _batch_norms(net: nn.Sequential, *, kept: Container[str]) -> dict[str, str]:
    """For each convolution that took in the batch normalisation right after it, the name of the latter."""
    normalized = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return {
        before: name
        for (before, _), (name, layer) in pairwise(named_layers(net))
        if isinstance(layer, normalized) and name not in kept
    }


def _difference(what: str, before: Tensor, after: Tensor, kind: str, precision: str, top1_changes: int) -> Difference:
    max_abs = (before - after).abs().max().item()
    scale = before.abs().max().item()
    relative = max_abs / scale if scale else (0.0 if max_abs == 0 else float("inf"))
    return Difference(what, kind, precision, len(before), max_abs, relative, top1_changes)


def _tolerance(precision: str) -> float:
    return {"float64": FLOAT64_TOLERANCE, "float32": FLOAT32_TOLERANCE}[precision]
