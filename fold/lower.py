"""Exact ways to write an NCReLU and the convolution after it.

With W' = [W1 W2] split along its inputs (eq. 10), a layer computes W1 ⊙ max(x, 0) + W2 ⊙ min(x, 0). Because
min(x, 0) = x − max(x, 0), the same is (W1 − W2) ⊙ ρ(x) + W2 ⊙ x. The forms are equal in exact arithmetic;
they differ in what a runtime can fuse and in what eight bits can represent.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.refusal import Refusal
from fold.graph import GraphNet
from fold.lowerings import LOWERINGS, Lowering
from fold.nodes import Graph, Node
from fold.plain import Convolution, Layers, Operation, PlainNet, as_sequential, convolution, named_layers, nest
from train.layers import NCReLU, Residual, dirac_delta, sequence

GRAPH_LOWERINGS: tuple[Lowering, ...] = ("concat", "shared", "shared-split", "split")
# A channel whose tap is negative or below this share of the median is rescaled by the median instead of its own tap:
# otherwise its activations would grow from layer to layer and take the range of eight bits for themselves.
SMALLEST_TAP = 1 / 4


class SharedReLU(nn.Module):
    """x [N, C, ...] → [ρ(x); x], [N, 2C, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), x], dim=1)


class Mirror(nn.Module):
    """x [N, C, ...] → [x; −x], [N, 2C, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], dim=1)


class Negate(nn.Module):
    """x → −x."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


class Repeat(nn.Module):
    """x [N, C, ...] → [x; x], [N, 2C, ...]: δ of eq. 8 for twice as many outputs as inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)


def lower(net: PlainNet, lowering: str) -> PlainNet:
    """`net`, a plain net (fold/plain.py), written as `lowering`: other layers, the same logits.

    concat: as it is. shared: one convolution of [ρ(x); x]. shared-split: two convolutions, of ρ(x) and
    of x, and their sum. split: two, of ρ(x) and of ρ(−x). mirror: the convolution before emits
    [z; −z], and a ReLU is all that remains. skip: δ leaves the filters again and becomes an identity
    beside them, for eight-bit weights; see `_skip`.
    A layer keeps its name and, but for mirror (z first) and skip (up to a positive factor per channel),
    its output. `net` stays as it was. A graph stays a graph, except for mirror and skip, which need a chain of
    layers. Refuses other lowerings, and graphs that are not such a chain.
    """
    if lowering not in LOWERINGS:
        raise Refusal(f"lowering must be one of {', '.join(LOWERINGS)}, got {lowering}")
    if isinstance(net, GraphNet) and lowering in GRAPH_LOWERINGS:
        return GraphNet(_lower_graph(net.with_tensors(), lowering)).eval()
    chain = layers_of(net)
    if chain is None:
        raise Refusal(
            f"lowering {lowering} is for chains of convolutions, ReLU, NCReLU and max-pools, and this net is not one; "
            f"choose one of {', '.join(GRAPH_LOWERINGS)}"
        )
    layers = list(named_layers(deepcopy(chain)))
    match lowering:
        case "concat":
            return nest(layers)
        case "shared" | "shared-split" | "split":
            return nest(_rewrite_pairs(layers, lowering))
        case "mirror":
            return nest(_mirror(layers))
        case "skip":
            return nest(_skip(layers))


def layers_of(net: PlainNet) -> nn.Sequential | None:
    """A plain net as layers; None for a graph that is not a chain of the layers that this project's nets have."""
    if not isinstance(net, GraphNet):
        return net
    try:
        layers = as_sequential(net.with_tensors())
    except TypeError:
        return None
    return None if any(isinstance(layer, Operation) for layer in layers.modules()) else layers


def distinct_lowerings(net: PlainNet) -> tuple[Lowering, ...]:
    """Those that write `net` differently: a net without NCReLU has a single form beside skip."""
    layers = layers_of(net)
    if layers is None:
        return GRAPH_LOWERINGS if isinstance(net, GraphNet) and net.graph.count("ncrelu") else ("concat",)
    has_ncrelu = any(isinstance(layer, NCReLU) for _, layer in named_layers(layers))
    return LOWERINGS if has_ncrelu else ("concat", "skip")


def split_ncrelu(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[W1 W2] of eq. 10: the halves of the filters that read max(x, 0) and min(x, 0)."""
    w1, w2 = weight.chunk(2, dim=1)
    return w1, w2


def convolution_like(layer: Convolution, weight: Tensor, bias: Tensor | None) -> Convolution:
    """A convolution with weights [N_o, N_i, K...] that strides and pads like `layer`."""
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    return convolution(weight, bias, **how)


def _rewrite_pairs(layers: Layers, lowering: str) -> Iterator[tuple[str, nn.Module]]:
    """Every NCReLU and the convolution after it in another form; other layers as they are."""
    rest = iter(layers)
    for name, layer in rest:
        if not isinstance(layer, NCReLU):
            yield name, layer
            continue
        conv_name, conv = _convolution(*next(rest))
        w1, w2 = split_ncrelu(conv.weight)
        match lowering:
            case "shared":
                yield name, SharedReLU()
                yield conv_name, convolution_like(conv, torch.cat([w1 - w2, w2], dim=1), conv.bias)
            case "shared-split":
                body = sequence(relu=nn.ReLU(), conv=convolution_like(conv, w1 - w2, conv.bias))
                yield conv_name, Residual(body, sequence(conv=convolution_like(conv, w2, None)))
            case _:
                body = sequence(relu=nn.ReLU(), conv=convolution_like(conv, w1, conv.bias))
                other = sequence(negate=Negate(), relu=nn.ReLU(), conv=convolution_like(conv, -w2, None))
                yield conv_name, Residual(body, other)


def _convolution(name: str, layer: nn.Module) -> tuple[str, nn.Conv2d]:
    """The layer after an NCReLU; raises TypeError unless it is a convolution."""
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"{name}: {type(layer).__name__} after an NCReLU can only be written as concat")
    return name, layer


def _mirror(layers: Layers) -> Layers:
    """Only convolutions and ReLUs. After a max-pool, which would lose −z, a `Mirror` makes [x; −x]."""
    lowered: Layers = []
    after_ncrelu = False
    for name, layer in layers:
        if isinstance(layer, NCReLU):
            before, last = lowered[-1]
            if isinstance(last, nn.Conv2d):
                weight, bias = (torch.cat([part, -part]) for part in (last.weight, last.get_parameter("bias")))
                lowered[-1] = (before, convolution_like(last, weight, bias))
            else:
                lowered.append((f"{name}.mirror", Mirror()))
            lowered.append((name if isinstance(last, nn.Conv2d) else f"{name}.relu", nn.ReLU()))
        elif after_ncrelu:
            _, conv = _convolution(name, layer)
            w1, w2 = split_ncrelu(conv.weight)
            lowered.append((name, convolution_like(conv, torch.cat([w1, -w2], dim=1), conv.bias)))
        else:
            lowered.append((name, layer))
        after_ncrelu = isinstance(layer, NCReLU)
    return lowered


def _skip(layers: Layers) -> Layers:
    """δ outside the filters: y = W̃ ⊙ u + δ ⊙ u, the residual net that a Dirac net implies (eq. 12).

    Activations and max-pools commute with positive factors, so every channel can be measured in a unit t of its
    own: x = t x̃. In these units a filter is W t / t'. If t' are the filter's taps under δ, this is δ, without
    a factor, plus W̃ = W t / t' − δ, which has lost the largest weights. δ ⊙ NCReLU(x) of eq. 7 is x. Where W̃ has
    weights larger than δ's ones, as without Dirac parameterization, the filter stays whole and units restart at 1.
    """
    lowered: Layers = []
    units: Tensor | None = None  # of the channels that the next layer reads; None: all 1
    for name, layer in layers:
        match layer:
            case NCReLU():
                units = None if units is None else units.repeat(2)
                lowered.append((name, layer))
            case nn.Conv2d():
                weight = layer.weight if units is None else layer.weight * units.view(-1, 1, 1)
                rescaled = _without_delta(layer, weight)
                if rescaled is None:
                    lowered.append((name, convolution_like(layer, weight, layer.bias)))
                    units = None
                    continue
                weight, units = rescaled
                bias = layer.get_parameter("bias") / units
                lowered += _beside_delta(lowered, name, convolution_like(layer, weight, bias))
            case nn.Linear():
                lowered.append((name, layer))
                if units is not None:
                    layer.weight = nn.Parameter(layer.weight * units, requires_grad=False)
                units = None
            case nn.ReLU() | nn.MaxPool2d() | nn.AdaptiveAvgPool2d() | nn.Flatten():
                lowered.append((name, layer))
            case _:
                if units is not None:
                    raise TypeError(f"{name}: {type(layer).__name__} does not commute with positive factors")
                lowered.append((name, layer))
    return lowered


def _without_delta(conv: nn.Conv2d, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """(W̃, units of the outputs) of a convolution with filters `weight`; None where removing δ does not pay."""
    num_out, num_in = weight.shape[:2]
    centred = conv.padding == tuple((size - 1) / 2 for size in conv.kernel_size)
    if not centred or conv.stride != (1, 1) or conv.groups != 1 or num_in not in (num_out / 2, num_out, 2 * num_out):
        return None
    delta = dirac_delta(weight.shape).to(weight)
    taps = (weight * delta).sum(dim=(1, 2, 3)) / delta.sum(dim=(1, 2, 3))
    median = taps.median()
    if median <= 0:
        return None
    units = torch.where(taps < SMALLEST_TAP * median, median, taps)
    rest = weight / units.view(-1, 1, 1, 1) - delta
    return (rest, units) if rest.abs().amax(dim=(1, 2, 3)).median() < 1 else None


def _beside_delta(lowered: Layers, name: str, conv: Convolution) -> Layers:
    """The convolution with δ beside it. Where δ ⊙ NCReLU(x) is x, moves the NCReLU from `lowered` into the branch."""
    num_out, num_in = conv.weight.shape[:2]
    if num_in == 2 * num_out:
        _, ncrelu = lowered.pop()
        return [(name, Residual(sequence(ncrelu=ncrelu, conv=conv), nn.Sequential()))]
    shortcut = nn.Sequential() if num_in == num_out else sequence(repeat=Repeat())
    return [(name, Residual(sequence(conv=conv), shortcut))]


def _lower_graph(graph: Graph, lowering: str) -> Graph:
    """The same outputs from other nodes. A convolution keeps its name.

    An NCReLU stays as it is unless all its readers are convolutions without groups.
    """
    halved = {
        node.name
        for node in graph.nodes[:-1]
        if node.op == "ncrelu"
        and all(reader.op == "conv" and reader.attributes["groups"] == 1 for reader in graph.readers(node.name))
    }
    if lowering == "concat" or not halved:
        return graph
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name in halved:
            nodes += _ncrelu_nodes(node, lowering)
        elif node.op == "conv" and node.inputs[0] in halved:
            nodes += _convolution_nodes(node, graph[node.inputs[0]], lowering)
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _ncrelu_nodes(node: Node, lowering: str) -> Iterator[Node]:
    """The nodes that the convolutions then read, named after the NCReLU."""
    (x,) = node.inputs
    match lowering:
        case "shared":
            yield Node(f"{node.name}.positive", "relu", (x,))
            yield Node(node.name, "cat", (f"{node.name}.positive", x))
        case "shared-split":
            yield Node(node.name, "relu", (x,))
        case _:
            yield Node(node.name, "relu", (x,))
            minus = {"scale": -torch.ones(1), "shift": torch.zeros(1)}
            yield Node(f"{node.name}.negative", "affine", (x,), {}, minus)
            yield Node(f"{node.name}.mirrored", "relu", (f"{node.name}.negative",))


def _convolution_nodes(node: Node, ncrelu: Node, lowering: str) -> Iterator[Node]:
    bias = node.tensors["bias"]
    w1, w2 = split_ncrelu(node.tensors["weight"])
    if lowering == "shared":
        yield replace(node, tensors={"weight": torch.cat([w1 - w2, w2], dim=1), "bias": bias})
        return
    first, second, source = (
        (w1 - w2, w2, ncrelu.inputs[0]) if lowering == "shared-split" else (w1, -w2, f"{ncrelu.name}.mirrored")
    )
    parts = (("body", ncrelu.name, first, bias), ("shortcut", source, second, torch.zeros_like(bias)))
    for part, read, weight, shift in parts:
        tensors = {"weight": weight.contiguous(), "bias": shift}
        yield replace(node, name=f"{node.name}.{part}", inputs=(read,), tensors=tensors, equals="-")
    yield Node(node.name, "add", tuple(f"{node.name}.{part}" for part, *_ in parts), {}, {}, node.origin)
