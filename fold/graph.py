"""The plain form of any net that can be traced: `plain = fold(net, example)`."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from fold.nodes import Graph, Node, run
from fold.rules import simplify
from fold.tracing import trace


class GraphNet(nn.Module):
    """A graph as a net; its tensors are buffers, named as in a file."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = replace(graph, nodes=tuple(replace(node, tensors={}) for node in graph.nodes))
        self._places: dict[str, tuple[str, ...]] = {}
        for node in graph.nodes:
            for key, tensor in node.tensors.items():
                self._place(node.name).register_buffer(key, tensor.detach())
            self._places[node.name] = tuple(node.tensors)

    def _place(self, name: str) -> nn.Module:
        place: nn.Module = self
        for part in ("nodes", *name.split(".")):
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        return place

    def with_tensors(self) -> Graph:
        """The graph with the current tensors."""
        return replace(self.graph, nodes=tuple(self._filled(node) for node in self.graph.nodes))

    def _filled(self, node: Node) -> Node:
        keys = self._places[node.name]
        return replace(node, tensors={key: self.get_buffer(f"nodes.{node.name}.{key}") for key in keys})

    def forward(self, x: Tensor) -> Tensor:
        for _, value in self.values(x):
            x = value
        return x

    def values(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every node's output by name, in order; outputs are dropped after their last reader."""
        last = {name: node.name for node in self.graph.nodes for name in node.inputs}
        held: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            value = x if node.op == "input" else run(self._filled(node), [held[name] for name in node.inputs])
            held[node.name] = value
            for name in {*node.inputs}:
                if last[name] == node.name:
                    del held[name]
            yield node.name, value


def fold(net: nn.Module, example: Tensor | None = None) -> GraphNet:
    """The plain form in float64 of any net that can be traced, in evaluation mode; `net` stays as it was.

    `example` is a batch for the net; it may be omitted if no operation depends on shapes.
    `.graph.blocked` says what was not merged, and why. Refuses what `trace` refuses.
    """
    return GraphNet(simplify(trace(net, example))).eval()
