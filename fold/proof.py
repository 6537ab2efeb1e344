"""The numerical proof that folding changed nothing."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.difference import TOLERANCES, difference, keeps_class, share
from fold.graph import GraphNet
from fold.lower import is_chain
from fold.nodes import TENSORS, Graph, Node
from fold.operations import LAYERS, OF_FUNCTIONS
from fold.tracing import trace
from train.layers import Residual

# PyTorch's float64 convolution unfolds a whole batch before it multiplies: 64 images at once take ten times as long
# as eight at a time.
BATCH_SIZE = 8
Forms = tuple[nn.Module, GraphNet, GraphNet | None]  # a net, its plain form, and the net as traced if it has no layers


@dataclass(frozen=True)
class ProofRow:
    """The difference of a layer or the logits on one kind of images; see `Difference` for the figures."""

    what: str  # "logits" or a layer's name
    images: str  # "random" or "real"; "given" if they have no name
    precision: str  # "float64" or "float32"
    num_images: int
    max_abs: float
    relative: float
    top1_changes: int  # images whose class changes by more than the tolerance allows


@dataclass(frozen=True)
class Proof:
    """All differences; true if those of the logits are within tolerance."""

    ends: tuple[ProofRow, ...]
    layers: tuple[ProofRow, ...]

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
    net: nn.Module,
    plain: GraphNet,
    image_sets: Tensor | Mapping[str, Tensor],
    *,
    traced: Graph | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Proof:
    """Compare a net with its plain float64 form on a batch, or on several named by kind.

    Compares every layer with weights and the logits, in float64 and float32. A chain of layers, as this project's nets
    are, is compared with its own layers; the layers of other nets, or where `traced` is given, with those of the net as
    `trace` sees it. Logits are always compared with the net's own.
    """
    sets = {"given": image_sets} if isinstance(image_sets, Tensor) else image_sets
    if traced is None and not _has_layers(net, plain.graph):
        traced = trace(net, next(iter(sets.values()))[:2])
    traced32 = traced and traced.convert(torch.float32)
    nets = {
        "float64": (deepcopy(net).double().eval(), plain, traced and GraphNet(traced)),
        "float32": (deepcopy(net).float().eval(), deepcopy(plain).float(), traced32 and GraphNet(traced32)),
    }
    ends: list[ProofRow] = []
    layers: list[ProofRow] = []
    for kind, images in sets.items():
        for precision, forms in nets.items():
            batches = images.to(getattr(torch, precision)) if images.is_floating_point() else images
            of_layers, end = _compare(forms, batches, kind, precision, advance)
            layers += of_layers
            ends.append(end)
    return Proof(tuple(ends), tuple(layers))


@torch.no_grad()
def _compare(
    forms: Forms, images: Tensor, kind: str, precision: str, advance: Callable[[int], None]
) -> tuple[list[ProofRow], ProofRow]:
    """All layers and the logits. Both nets run side by side, so that few outputs are held at once."""
    logits: list[tuple[Tensor, Tensor]] = []
    largest: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in torch.split(images, BATCH_SIZE):
        before = after = batch
        for name, before, after in _pairs(*forms, batch):
            if name:
                largest.setdefault(name, []).append(((before - after).abs().max(), before.abs().max()))
        logits.append((before.double(), after.double()))
        advance(len(batch))
    layers: list[ProofRow] = []
    for name, found in largest.items():
        max_abs, scale = (torch.stack(part).max().item() for part in zip(*found, strict=True))
        layers.append(ProofRow(name, kind, precision, len(images), max_abs, share(max_abs, scale), 0))
    before, after = (torch.cat(side).numpy() for side in zip(*logits, strict=True))
    if before.ndim != 2:
        raise ValueError(f"the net answers {list(before.shape)}; a proof is for classifiers, [N, classes]")
    end = difference(before, after)
    changes = int((~keeps_class(before, after, tolerance=TOLERANCES[precision])).sum())
    return layers, ProofRow("logits", kind, precision, len(images), end.max_abs, end.relative, changes)


def _pairs(
    net: nn.Module, plain: GraphNet, traced: GraphNet | None, batch: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, before, after) for each layer with weights; last the logits, without a name.

    Each node is beside the layer, or the traced node, of the same output; a partial sum has no such node.
    """
    there = {node.name for node in traced.graph.nodes} if traced else dict(named_layers(net))
    origins = {node.name: node.origin for node in weighted_layers(plain.graph) if node.origin in there}
    wanted, seen = {*origins.values()}, dict[str, Tensor]()
    befores = traced.values(batch) if traced else layer_outputs(net, batch.clone())  # a layer may work in place
    before = value = batch
    for name, value in plain.values(batch):
        origin = origins.get(name)
        while origin and origin not in seen:
            passed, before = next(befores)
            if passed in wanted:
                seen[passed] = before
        if origin:
            yield name, seen.pop(origin), value
    before = [before, *(output for _, output in befores)][-1]
    yield "", net(batch) if traced else before, value


def _has_layers(net: nn.Module, plain: Graph) -> bool:
    """Whether a net is a chain of layers, each traced as a whole, with the outputs of its plain form's."""
    known = (*LAYERS, *OF_FUNCTIONS, Residual)
    names = {name for name, layer in named_layers(net) if type(layer) in known}
    is_whole = type(net) is nn.Sequential and is_chain(plain)
    return is_whole and all(node.origin in names for node in weighted_layers(plain))


def named_layers(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The leaves of nested sequences, with dotted names, in the order in which they run."""
    for name, layer in net.named_children():
        if type(layer) is nn.Sequential:
            yield from named_layers(layer, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer


def layer_outputs(net: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The outputs of these layers, by name."""
    for name, layer in named_layers(net):
        x = layer(x)
        yield name, x


def weighted_layers(graph: Graph) -> list[Node]:
    """The layers with weights, in the order in which they run; in a chain, a sum with its branches is one of them."""
    weighted = TENSORS.keys() - {"normalize"}
    if is_chain(graph):
        return [node for node in graph.nodes if node.op in {*weighted, "add"} and node.name in graph.trunk]
    return [node for node in graph.nodes if node.op in weighted]
