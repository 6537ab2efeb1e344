"""The proof that folding changed nothing, in numbers."""

from collections.abc import Callable, Container, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fold.plain import named_layers
from train.difference import FLOAT32_TOLERANCE, difference, keeps_class, share

# In float64 folding reorders a few hundred roundings of 2^-53 per layer, which leaves 1e-15 to 1e-13 of the output;
# a wrong fold changes its first digits. Anything between the two is a bug.
TOLERANCES = {"float64": 1e-9, "float32": FLOAT32_TOLERANCE}
# PyTorch's float64 convolution spreads a whole batch out before it multiplies: 64 images at once take ten times
# as long as eight at a time.
BATCH_SIZE = 8


@dataclass(frozen=True)
class Row:
    """What one kind of images says of a layer or of the logits; differences as in `Difference`."""

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

    ends: tuple[Row, ...]
    layers: tuple[Row, ...]

    def __bool__(self) -> bool:
        return not self.failures()

    def failures(self) -> list[str]:
        """A clause for each difference beyond tolerance; NaN is beyond it."""
        return [
            f"{end.precision} logits on {end.images} images differ by {end.relative:.1e} (tolerance "
            f"{TOLERANCES[end.precision]:.0e}), top-1 on {end.top1_changes} of {end.num_images}"
            for end in self.ends
            if not end.relative <= TOLERANCES[end.precision] or end.top1_changes
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

    In float64 and float32: every layer with weights, and the logits.
    """
    nets = {
        "float64": (deepcopy(net).double().eval(), plain),
        "float32": (net.eval(), deepcopy(plain).float()),
    }
    ends: list[Row] = []
    layers: list[Row] = []
    for kind, images in image_sets.items():
        for precision, pair in nets.items():
            of_layers, end = _compare(*pair, images, kind, precision, advance)
            layers += of_layers
            ends.append(end)
    return Proof(tuple(ends), tuple(layers))


@torch.no_grad()
def _compare(
    dirac: nn.Sequential,
    plain: nn.Sequential,
    images: Tensor,
    kind: str,
    precision: str,
    advance: Callable[[int], None],
) -> tuple[list[Row], Row]:
    """All layers and the logits; both nets run side by side, so that no more than a layer's outputs are held."""
    names = weighted_layers(plain)
    logits: list[tuple[Tensor, Tensor]] = []
    largest: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for batch in torch.split(images, BATCH_SIZE):
        before = after = batch
        sides = (layer_outputs(net, batch, names) for net in (dirac, plain))
        for (name, before), (_, after) in zip(*sides, strict=True):
            largest[name].append(((before - after).abs().max(), before.abs().max()))
        logits.append((before.double(), after.double()))  # a net ends in its classifier
        advance(len(batch))
    layers: list[Row] = []
    for name, found in largest.items():
        max_abs, scale = (torch.stack(part).max().item() for part in zip(*found, strict=True))
        layers.append(Row(name, kind, precision, len(images), max_abs, share(max_abs, scale), 0))
    before, after = (torch.cat(side).numpy() for side in zip(*logits, strict=True))
    end = difference(before, after)
    changes = int((~keeps_class(before, after, tolerance=TOLERANCES[precision])).sum())
    return layers, Row("logits", kind, precision, len(images), end.max_abs, end.relative, changes)


def weighted_layers(plain: nn.Sequential) -> list[str]:
    """Names of the layers with weights, in the order in which they run."""
    return [name for name, layer in named_layers(plain) if list(layer.parameters())]


def layer_outputs(net: nn.Sequential, images: Tensor, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The outputs, in order, of the layers that a plain net calls `names`, of that net or of the Dirac net before it.

    A convolution that took in the batch normalisation after it has the output of the latter.
    """
    taken_in, x = _batch_norms(net, kept=names), images
    for name, layer in named_layers(net):
        x = layer(x)
        if name in names and name not in taken_in.values():
            yield name, x
        elif name in taken_in:
            yield taken_in[name], x


def _batch_norms(net: nn.Sequential, *, kept: Container[str]) -> dict[str, str]:
    """For each batch normalisation that the convolution right before it took in, the name of the latter."""
    normalized = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return {
        name: before
        for (before, _), (name, layer) in pairwise(named_layers(net))
        if isinstance(layer, normalized) and name not in kept
    }
