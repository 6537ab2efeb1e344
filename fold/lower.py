"""Exact ways to write an NCReLU and the convolution after it.

With W' = [W1 W2] split along its inputs (eq. 10), a layer computes W1 ⊙ max(x, 0) + W2 ⊙ min(x, 0). Because
min(x, 0) = x − max(x, 0), the same is (W1 − W2) ⊙ ρ(x) + W2 ⊙ x. The forms are equal in exact arithmetic;
they differ in what a runtime can fuse and in what eight bits can represent.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from common.refusal import Refusal
from fold.graph import GraphNet
from fold.lowerings import LOWERINGS, Lowering
from fold.nodes import Graph, Node
from train.layers import dirac_delta

OF_CHAINS: tuple[Lowering, ...] = ("mirror", "skip")
GRAPH_LOWERINGS: tuple[Lowering, ...] = tuple(name for name in LOWERINGS if name not in OF_CHAINS)
# A channel whose tap is negative or below this share of the median is rescaled by the median instead of its own tap:
# otherwise its activations would grow from layer to layer and take the range of eight bits for themselves.
SMALLEST_TAP = 1 / 4
# These commute with a positive factor for each channel.
HOMOGENEOUS = ("relu", "ncrelu", "max_pool", "global_pool", "flatten")


def lower(net: GraphNet, lowering: str) -> GraphNet:
    """`net`, a plain net (fold/graph.py), written as `lowering`: other nodes, the same logits.

    concat: as it is. shared: one convolution of [ρ(x); x]. shared-split: two convolutions, of ρ(x) and
    of x, and their sum. split: two, of ρ(x) and of ρ(−x). mirror: the convolution before emits
    [z; −z], and a ReLU is all that remains. skip: δ leaves the filters again and becomes an identity
    beside them, for eight-bit weights; see `_skip`.
    A convolution keeps its name and, but for mirror (z first) and skip (up to a positive factor per channel),
    its output. `net` stays as it was. Refuses other lowerings, and mirror and skip for a graph that is not a chain.
    An NCReLU stays as it is unless all its readers are convolutions without groups.
    """
    if lowering not in LOWERINGS:
        raise Refusal(f"lowering must be one of {', '.join(LOWERINGS)}, got {lowering}")
    graph = net.graph
    if lowering in OF_CHAINS and not is_chain(graph):
        raise Refusal(
            f"lowering {lowering} is for chains of convolutions, ReLU, NCReLU and max-pools, and this net is not one; "
            f"choose one of {', '.join(GRAPH_LOWERINGS)}"
        )
    match lowering:
        case "concat":
            nodes = graph.nodes
        case "mirror":
            nodes = _mirror(graph)
        case "skip":
            nodes = _skip(graph)
        case _:
            nodes = _split(graph, lowering)
    return GraphNet(replace(graph, nodes=tuple(nodes))).eval()


def distinct_lowerings(net: GraphNet) -> tuple[Lowering, ...]:
    """Those that write `net` differently: a net without NCReLU has a single form beside skip."""
    if net.graph.count("ncrelu"):
        return LOWERINGS if is_chain(net.graph) else GRAPH_LOWERINGS
    return ("concat", "skip") if is_chain(net.graph) else ("concat",)


def is_chain(graph: Graph) -> bool:
    """Whether a graph is a chain of the layers that this project's nets have, `Residual` among them."""
    branches = tuple(
        f"{node.name}.{part}." for node in graph.nodes for part in ("body", "shortcut") if node.op == "add"
    )
    return all(
        node.op in ("input", "normalize", "conv", "linear", "add", *HOMOGENEOUS)
        and (node.name in graph.trunk or node.name.startswith(branches))
        and len(node.inputs) <= 2  # as integer nodes add
        and (node.op != "linear" or graph.ranks[node.name] == 2)  # whose columns are channels
        for node in graph.nodes
    )


def split_ncrelu(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[W1 W2] of eq. 10: the halves of the filters that read max(x, 0) and min(x, 0)."""
    w1, w2 = weight.chunk(2, dim=1)
    return w1, w2


def _rewritten(graph: Graph) -> set[str]:
    """The NCReLUs whose readers are all convolutions without groups."""
    return {
        node.name
        for node in graph.nodes[:-1]
        if node.op == "ncrelu"
        and all(reader.op == "conv" and reader.attributes["groups"] == 1 for reader in graph.readers(node.name))
    }


def _split(graph: Graph, lowering: str) -> Iterator[Node]:
    """The nodes as shared, shared-split or split."""
    rewritten = _rewritten(graph)
    for node in graph.nodes:
        if node.name in rewritten:
            yield from _ncrelu_nodes(node, lowering)
        elif node.op == "conv" and node.inputs[0] in rewritten:
            yield from _convolution_nodes(node, graph[node.inputs[0]], lowering)
        else:
            yield node


def _ncrelu_nodes(node: Node, lowering: str) -> Iterator[Node]:
    """The nodes that the convolutions then read, named after the NCReLU."""
    name, (x,) = node.name, node.inputs
    match lowering:
        case "shared":
            yield Node(f"{name}.positive", "relu", (x,))
            yield Node(name, "cat", (f"{name}.positive", x))
        case "shared-split":
            yield Node(name, "relu", (x,))
        case _:
            yield Node(name, "relu", (x,))
            yield _negative(f"{name}.negative", x)
            yield Node(f"{name}.mirrored", "relu", (f"{name}.negative",))


def _negative(name: str, x: str) -> Node:
    return Node(name, "affine", (x,), {}, {"scale": -torch.ones(1), "shift": torch.zeros(1)})


def _convolution_nodes(node: Node, ncrelu: Node, lowering: str) -> Iterator[Node]:
    w1, w2 = split_ncrelu(node.tensors["weight"])
    match lowering:
        case "shared":
            yield replace(node, tensors={**node.tensors, "weight": torch.cat([w1 - w2, w2], dim=1)})
        case "shared-split":
            yield from _sum(node, w1 - w2, w2, source=ncrelu.inputs[0])
        case _:
            yield from _sum(node, w1, -w2, source=f"{ncrelu.name}.mirrored")


def _sum(node: Node, first: Tensor, second: Tensor, *, source: str) -> Iterator[Node]:
    """Two convolutions like `node` and their sum; the second reads `source` and has no bias."""
    one, two = f"{node.name}.body", f"{node.name}.shortcut"
    yield replace(node, name=one, tensors={**node.tensors, "weight": first.contiguous()}, equals="-")
    yield replace(node, name=two, inputs=(source,), tensors={"weight": second.contiguous()}, equals="-")
    yield Node(node.name, "add", (one, two), {}, {}, node.origin)


def _mirror(graph: Graph) -> Iterator[Node]:
    """Only convolutions and ReLUs. After a max-pool, which would lose −z, a concatenation makes [x; −x]."""
    rewritten = _rewritten(graph)
    doubled = {  # convolutions that emit [z; −z]; of groups, each would emit its own halves
        node.name
        for node in graph.nodes[:-1]
        if node.op == "conv"
        and node.attributes["groups"] == 1
        and rewritten.issuperset(reader.name for reader in graph.readers(node.name))
    }
    for node in graph.nodes:
        if node.name in rewritten and doubled.isdisjoint(node.inputs):
            (x,), mirror = node.inputs, f"{node.name}.mirror"
            yield _negative(f"{mirror}.negative", x)
            yield Node(mirror, "cat", (x, f"{mirror}.negative"))
            yield Node(node.name, "relu", (mirror,))
            continue
        tensors = node.tensors
        if not rewritten.isdisjoint(node.inputs):
            w1, w2 = split_ncrelu(tensors["weight"])
            tensors = {**tensors, "weight": torch.cat([w1, -w2], dim=1)}
        if node.name in doubled:
            tensors = {key: torch.cat([part, -part]) for key, part in tensors.items()}
        yield replace(node, op="relu" if node.name in rewritten else node.op, tensors=tensors)


def _skip(graph: Graph) -> Iterator[Node]:
    """δ outside the filters: y = W̃ ⊙ u + δ ⊙ u, the residual net that a Dirac net implies (eq. 12).

    Activations and max-pools commute with positive factors, so every channel can be measured in a unit t of its
    own: x = t x̃. In these units a filter is W t / t'. If t' are the filter's taps under δ, this is δ, without
    a factor, plus W̃ = W t / t' − δ, which has lost the largest weights. δ ⊙ NCReLU(x) of eq. 7 is x. Where W̃ has
    weights larger than δ's ones, as without Dirac parameterization, the filter stays whole and units restart at 1.
    """
    units: dict[str, Tensor] = {}  # of the channels of a node's output; all 1 where there are none
    for node in graph.nodes:
        x = node.inputs[0] if node.inputs else ""
        if x in units:
            if node.op in HOMOGENEOUS:
                units[node.name] = units[x].repeat(2) if node.op == "ncrelu" else units[x]
            else:
                node = _reading(node, units[x])
        rescaled = _without_delta(graph, node) if node.op == "conv" and node.name in graph.trunk else None
        if rescaled is None:
            yield node
        else:
            rest, units[node.name] = rescaled
            yield from _beside_delta(graph, node, rest, units[node.name])


def _reading(node: Node, units: Tensor) -> Node:
    """A convolution or a matrix that reads channels in these units; flattening gives a channel several columns."""
    weight = node.tensors["weight"]
    factors = units.repeat_interleave(weight.shape[1] // len(units)).view(-1, *[1] * (weight.dim() - 2))
    return replace(node, tensors={**node.tensors, "weight": weight * factors})


def _without_delta(graph: Graph, node: Node) -> tuple[Tensor, Tensor] | None:
    """(W̃, units of the outputs) of a convolution; None where removing δ does not pay."""
    weight, how = node.tensors["weight"], node.attributes
    (num_out, num_in, *kernel), dims = weight.shape, tuple(range(1, weight.dim()))
    is_centred = how["padding"] == [[(size - 1) / 2] * 2 for size in kernel]
    is_dense = {*how["stride"], *how["dilation"], how["groups"]} == {1}
    has_ncrelu = graph[node.inputs[0]].op == "ncrelu"
    is_fitting = num_in in (num_out / 2, num_out) or (has_ncrelu and num_in == 2 * num_out)
    if not (is_centred and is_dense and is_fitting and _ends_in_filters(graph, node)):
        return None
    delta = dirac_delta(weight.shape).to(weight)
    taps = (weight * delta).sum(dim=dims) / delta.sum(dim=dims)
    median = taps.median()
    if median <= 0:
        return None
    units = torch.where(taps < SMALLEST_TAP * median, median, taps)
    rest = weight / units.view(-1, *[1] * len(dims)) - delta
    return (rest, units) if rest.abs().amax(dim=dims).median() < 1 else None


def _ends_in_filters(graph: Graph, node: Node) -> bool:
    """Whether one convolution without groups or one matrix, and nothing else, reads a node's channels in the end."""
    while len(readers := graph.readers(node.name)) == 1:
        (node,) = readers
        if node.op not in HOMOGENEOUS:
            return node.op == "linear" or (node.op == "conv" and node.attributes["groups"] == 1)
    return False


def _beside_delta(graph: Graph, node: Node, rest: Tensor, units: Tensor) -> Iterator[Node]:
    """The convolution with δ beside it."""
    num_out, num_in = rest.shape[:2]
    body, (x,) = f"{node.name}.body.conv", node.inputs
    tensors = {"weight": rest, "bias": node.tensors["bias"] / units}
    yield replace(node, name=body, tensors=tensors, equals="-")
    if num_in == 2 * num_out:  # δ ⊙ NCReLU(x) is x
        (x,) = graph[x].inputs
    elif num_out == 2 * num_in:  # δ of eq. 8
        yield Node(f"{node.name}.shortcut.repeat", "cat", (x, x))
        x = f"{node.name}.shortcut.repeat"
    yield Node(node.name, "add", (body, x), {}, {}, "-")
