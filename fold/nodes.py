"""A net as plain data: named operations, what they read, and their numbers. It contains no code.

fold/tracing.py makes a graph of a net, fold/rules.py simplifies it, fold/graph.py runs it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.refusal import Refusal
from train.layers import ncrelu


@dataclass(frozen=True)
class Node:
    """One operation. `name` is unique, and that of the user's module where there is one."""

    name: str
    op: str  # a key of OPERATIONS
    inputs: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])  # JSON
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    equals: str = ""  # the node of the traced graph with this output; empty if it has the same name

    def __str__(self) -> str:
        shapes = (f" {key} {list(tensor.shape)}" for key, tensor in self.tensors.items())
        return f"{self.name}: {self.op}{''.join(shapes)}{' of ' * bool(self.inputs)}{', '.join(self.inputs)}"

    @property
    def origin(self) -> str:
        return self.equals or self.name

    def reading(self, instead: Mapping[str, str]) -> "Node":
        """The node with inputs replaced by the names that `instead` has for them."""
        inputs = tuple(instead.get(name, name) for name in self.inputs)
        return self if inputs == self.inputs else replace(self, inputs=inputs)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, which have names of their own in a file."""
        lists = {"inputs": list(self.inputs), "attributes": dict(self.attributes), "tensors": sorted(self.tensors)}
        return vars(self) | lists


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can run: the first is the input, the last gives the output."""

    nodes: tuple[Node, ...]
    blocked: tuple[str, ...] = ()  # what was not merged, and why

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    def readers(self, name: str) -> list[Node]:
        return self._readers.get(name, [])

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _readers(self) -> dict[str, list[Node]]:
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                readers.setdefault(name, []).append(node)
        return readers

    @cached_property
    def ranks(self) -> dict[str, int | None]:
        """By name; see `rank_after`."""
        ranks: dict[str, int | None] = {}
        for node in self.nodes:
            ranks[node.name] = rank_after(node, ranks)
        return ranks

    @cached_property
    def trunk(self) -> set[str]:
        """The nodes that all paths pass: when one of them has run, nothing else is left to be read."""
        places = {node.name: index for index, node in enumerate(self.nodes)}
        trunk, furthest = set[str](), 0
        for index, node in enumerate(self.nodes):
            if furthest <= index:
                trunk.add(node.name)
            furthest = max([furthest, *(places[reader.name] for reader in self.readers(node.name))])
        return trunk

    def count(self, op: str) -> int:
        return sum(node.op == op for node in self.nodes)

    def to_dict(self) -> list[dict[str, Any]]:
        return [node.to_dict() for node in self.nodes]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{node.name}.{key}": value for node in self.nodes for key, value in node.tensors.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Graph":
        """The same nodes with those of `tensors`, by the names that `tensors()` gives, in place of their own."""
        own = (
            {key: tensors.get(f"{node.name}.{key}", old) for key, old in node.tensors.items()} for node in self.nodes
        )
        nodes = (replace(node, tensors=new) for node, new in zip(self.nodes, own, strict=True))
        return replace(self, nodes=tuple(nodes))

    def convert(self, dtype: torch.dtype) -> "Graph":
        return self.with_tensors({name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    @classmethod
    def from_dict(cls, entries: Any, tensors: Mapping[str, Tensor]) -> "Graph":
        """The inverse of `to_dict` and `tensors`; refuses operations that are not listed, and what does not fit."""
        try:
            nodes: list[Node] = []
            for entry in entries:
                name, inputs = str(entry["name"]), tuple(str(value) for value in entry["inputs"])
                own = {str(key): tensors[f"{name}.{key}"] for key in entry["tensors"]}
                nodes.append(Node(name, str(entry["op"]), inputs, dict(entry["attributes"]), own, str(entry["equals"])))
            graph = cls(tuple(nodes))
        except (TypeError, KeyError, ValueError) as error:
            raise Refusal(f"the graph in the file is damaged: {error!r}") from error
        graph.check()
        if unread := tensors.keys() - graph.tensors().keys():
            raise Refusal(f"the graph in the file reads none of {', '.join(sorted(unread))}")
        return graph

    def check(self) -> None:
        """Refuses operations that are not listed, names used twice, and nodes that read later ones."""
        seen: set[str] = set()
        for index, node in enumerate(self.nodes):
            if node.op not in OPERATIONS or (node.op == "input") != (index == 0):
                raise Refusal(f"{node.name}: {node.op} is not one of {', '.join(OPERATIONS)}")
            if node.name in seen or not seen.issuperset(node.inputs):
                raise Refusal(f"{node.name}: the graph uses a name twice, or reads {node.inputs} too early")
            keys = TENSORS.get(node.op, ())
            if set(node.tensors) != set(keys):
                raise Refusal(f"{node.name}: {node.op} has tensors {sorted(node.tensors)}, not {sorted(keys)}")
            seen.add(node.name)
        if len(self.nodes) < 2:
            raise Refusal("the graph has no operation")


def needed(nodes: Sequence[Node], last: str) -> tuple[Node, ...]:
    """The node `last` and all that it depends on, in the order of `nodes`."""
    read = {last}
    for node in reversed(nodes):
        if node.name in read:
            read.update(node.inputs)
    return tuple(node for node in nodes if node.name in read)


def rank_after(node: Node, ranks: Mapping[str, int | None]) -> int | None:
    """The number of dimensions of a node's output, with the batch, from those of the nodes before it; None: unknown."""
    match node.op:
        case "input":
            return node.attributes.get("rank")
        case "normalize":
            return 4
        case "conv":
            return node.tensors["weight"].dim()
        case "max_pool" | "avg_pool":
            return len(node.attributes["size"]) + 2
        case "pad":
            return len(node.attributes["padding"]) + 2
        case "flatten":
            return 2
        case "affine" if "rank" in node.attributes:
            return node.attributes["rank"]
        case _:
            return next((ranks[name] for name in node.inputs if ranks[name] is not None), None)


def run(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """A node's output."""
    return JOINS[node.op](inputs) if node.op in JOINS else MAPS[node.op](node, *inputs)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] beside x [N, C, ...]."""
    return values.view(-1, *[1] * (x.dim() - 2))


def _normalize(node: Node, images: Tensor) -> Tensor:
    offset, scale = node.tensors["offset"], node.tensors["scale"]
    return (images.permute(0, 3, 1, 2).to(scale.dtype) - offset) * scale


def _padded(x: Tensor, padding: Sequence[Sequence[int]]) -> Tensor:
    flat = [end for pair in reversed(padding) for end in pair]
    return F.pad(x, flat) if any(flat) else x


def _conv(node: Node, x: Tensor) -> Tensor:
    weight, how = node.tensors["weight"], node.attributes
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    padding = [before for before, _ in how["padding"]]
    if any(before != after for before, after in how["padding"]):
        x, padding = _padded(x, how["padding"]), 0
    return convolve(x, weight, node.tensors.get("bias"), how["stride"], padding, how["dilation"], how["groups"])


def _max_pool(node: Node, x: Tensor) -> Tensor:
    how, pool = node.attributes, (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(node.attributes["size"]) - 1]
    return pool(x, how["size"], how["stride"], how["padding"], how["dilation"], ceil_mode=how["ceil"])


def _avg_pool(node: Node, x: Tensor) -> Tensor:
    how, pool = node.attributes, (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(node.attributes["size"]) - 1]
    return pool(x, how["size"], how["stride"], how["padding"], how["ceil"], how["count_padding"])


# Operations of several inputs.
JOINS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "add": lambda inputs: reduce(torch.add, inputs),
    "mul": lambda inputs: reduce(torch.mul, inputs),
    "cat": lambda inputs: torch.cat(list(inputs), dim=1),
}
# Operations of one input.
MAPS: dict[str, Callable[[Node, Tensor], Tensor]] = {
    "input": lambda node, x: x,
    "normalize": _normalize,
    "conv": _conv,
    "linear": lambda node, x: F.linear(x, node.tensors["weight"], node.tensors["bias"]),
    "affine": lambda node, x: per_channel(node.tensors["scale"], x) * x + per_channel(node.tensors["shift"], x),
    "slice": lambda node, x: x[:, node.attributes["start"] : node.attributes["stop"]],
    "pad": lambda node, x: _padded(x, node.attributes["padding"]),
    "relu": lambda node, x: F.relu(x),
    "ncrelu": lambda node, x: ncrelu(x),
    "clip": lambda node, x: x.clamp(node.attributes["low"], node.attributes["high"]),
    "leaky_relu": lambda node, x: F.leaky_relu(x, node.attributes["slope"]),
    "gelu": lambda node, x: F.gelu(x, approximate=node.attributes["approximate"]),
    "silu": lambda node, x: F.silu(x),
    "sigmoid": lambda node, x: torch.sigmoid(x),
    "hardswish": lambda node, x: F.hardswish(x),
    "hardsigmoid": lambda node, x: F.hardsigmoid(x),
    "tanh": lambda node, x: torch.tanh(x),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "global_pool": lambda node, x: x.mean(dim=list(range(2, x.dim())), keepdim=True),
    "flatten": lambda node, x: x.flatten(1),
}
OPERATIONS = (*MAPS, *JOINS)
TENSORS = {  # a convolution that a lowering makes may lack its bias
    "normalize": ("offset", "scale"),
    "conv": ("weight", "bias"),
    "linear": ("weight", "bias"),
    "affine": ("scale", "shift"),
}
