"""The plain form of any net that can be traced: `plain = fold(net, example)`."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from fold.nodes import Graph, Node, run
from fold.rules import simplify
from fold.tracing import trace


class GraphNet(nn.Module):
    """A graph as a net. `graph` has its current tensors; they are buffers, called `nodes.` and their name in a file."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.nodes = nn.Module()
        self.graph = replace(graph, nodes=tuple(map(self._bind, graph.nodes)))
        last = {name: node.name for node in graph.nodes for name in node.inputs}
        self._dropped = [[name for name in {*node.inputs} if last[name] == node.name] for node in graph.nodes]

    def _bind(self, node: Node) -> Node:
        """The node with a module's own buffers as its tensors, which `to`, `float` and the like replace in place."""
        place = self.nodes
        for part in node.name.split(".") if node.tensors else ():
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        for key, tensor in node.tensors.items():
            place.register_buffer(key, tensor.detach())
        return replace(node, tensors=place._buffers) if node.tensors else node

    def __repr__(self) -> str:
        return "\n  ".join(["GraphNet(", *map(str, self.graph.nodes)]) + "\n)"

    def forward(self, x: Tensor) -> Tensor:
        for _, value in self.values(x):
            x = value
        return x

    def values(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every node's output by name, in order; outputs are dropped after their last reader."""
        held: dict[str, Tensor] = {}
        for node, dropped in zip(self.graph.nodes, self._dropped, strict=True):
            value = run(node, [held[name] for name in node.inputs]) if node.inputs else x
            held[node.name] = value
            for name in dropped:
                del held[name]
            yield node.name, value


def fold(net: nn.Module, example: Tensor | None = None) -> GraphNet:
    """The plain form in float64 of any net that can be traced, in evaluation mode; `net` stays as it was.

    Layers keep their names; fold/rules.py says what is merged, and `.graph.blocked` what was not, and why. `example`
    is a batch for the net; it may be omitted if no operation depends on shapes. Refuses what `trace` refuses.
    """
    return GraphNet(simplify(trace(net, example))).eval()
