"""The lowerings of a graph: an NCReLU and the convolutions that read it, written in another form (eq. 10)."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from fold.lowerings import Lowering
from fold.nodes import Graph, Node
from fold.passes import split_ncrelu

GRAPH_LOWERINGS: tuple[Lowering, ...] = ("concat", "shared", "shared-split", "split")


def lower_graph(graph: Graph, lowering: str) -> Graph:
    """The same outputs by other nodes; see `lower` in fold/lower.py. A convolution keeps its name.

    An NCReLU that anything but convolutions without groups reads stays as it is.
    """
    halved = {
        node.name
        for node in graph.nodes
        if node.op == "ncrelu"
        and node is not graph.nodes[-1]
        and all(reader.op == "conv" and reader.attributes["groups"] == 1 for reader in graph.readers(node.name))
    }
    if lowering == "concat" or not halved:
        return graph
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name in halved:
            nodes += _ncrelu(node, lowering)
        elif node.op == "conv" and node.inputs[0] in halved:
            nodes += _convolution(node, graph[node.inputs[0]], lowering)
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _ncrelu(node: Node, lowering: str) -> Iterator[Node]:
    """What the convolutions then read; the parts are named after the NCReLU."""
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


def _convolution(node: Node, ncrelu: Node, lowering: str) -> Iterator[Node]:
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
