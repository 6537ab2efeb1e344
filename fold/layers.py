"""From a graph that is a chain, with sums of two branches, to an `nn.Sequential` of named layers."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fold.nodes import Graph, Node, run
from train.layers import NCReLU, Normalize, Residual

Layers = list[tuple[str, nn.Module]]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
# By the number of the weight's dimensions.
CONVOLUTIONS: dict[int, Callable[..., Convolution]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Operation(nn.Module):
    """A node without tensors and with one input, as a layer."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        return run(self.node, [x])

    def extra_repr(self) -> str:
        return self.node.op


def as_sequential(graph: Graph) -> nn.Sequential:
    """The layers of a chain, named like the nodes; raises TypeError with the names of nodes that are in no chain."""
    before, rest = graph.nodes[0].name, list(graph.nodes[1:])
    layers: Layers = []
    wrong: list[str] = []
    while rest:
        if residual := _residual(graph, rest, before):
            node, layer = residual
        else:
            node = rest[0]
            layer = _layer(node, graph.rank(node.name)) if node.inputs == (before,) else None
        if layer is None:
            wrong.append(f"{node.name} ({node.op})")
        layers.append((node.name, layer or nn.Identity()))
        rest, before = rest[rest.index(node) + 1 :], node.name
    if wrong:
        raise _not_a_chain(", ".join(wrong))
    return nest(layers)


def nest(layers: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    """Layers with dotted names as nested sequences: the inverse of `named_layers`.

    Raises TypeError if sequences of these names would run in another order, or be inside a layer.
    """
    net, before = nn.Sequential(), list[str]()
    for name, layer in layers:
        *path, leaf = parts = name.split(".")
        place: nn.Module = net
        for depth, part in enumerate(path):
            is_open = before[: depth + 1] == path[: depth + 1] and len(before) > depth + 1
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Sequential())
            elif not is_open:
                raise _not_a_chain(f"{name} runs apart from its module")
            place = place.get_submodule(part)
        if leaf in dict(place.named_children()):
            raise _not_a_chain(f"{name} is a layer and a module")
        place.add_module(leaf, layer)
        before = parts
    return net.eval()


def _not_a_chain(reason: str) -> TypeError:
    return TypeError(f"not a chain of layers: {reason}; fold.graph.fold takes such nets")


def convolution(weight: Tensor, bias: Tensor | None, **how: Any) -> Convolution:
    """An ordinary convolution with weights [N_o, N_i / groups, K...]; `how` is stride, padding, dilation and groups."""
    num_out, per_group, *kernel = weight.shape
    make = CONVOLUTIONS[weight.dim()]
    layer = make(per_group * how["groups"], num_out, kernel, **how, bias=bias is not None, device="meta")
    layer.weight = _fixed(weight)
    if bias is not None:
        layer.bias = _fixed(bias)
    return layer


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _residual(graph: Graph, rest: list[Node], source: str) -> tuple[Node, Residual] | None:
    """The sum whose branches, nodes named `<sum>.body.` and `<sum>.shortcut.`, come next, as a layer of both."""
    for index, node in enumerate(rest):
        prefixes = [f"{node.name}.{branch}." for branch in ("body", "shortcut")]
        inside = rest[:index]
        if node.op != "add" or len(node.inputs) != 2 or not rest[0].name.startswith(tuple(prefixes)):
            continue
        if not all(part.name.startswith(tuple(prefixes)) for part in inside):
            continue
        branches = [[part for part in inside if part.name.startswith(prefix)] for prefix in prefixes]
        if node.inputs != tuple(nodes[-1].name if nodes else source for nodes in branches):
            return None
        start = Node(source, "input", (), {"rank": graph.rank(source)})
        parts = (
            as_sequential(Graph(tuple(_shortened(part, prefix) for part in (start, *nodes))))
            for nodes, prefix in zip(branches, prefixes, strict=True)
        )
        return node, Residual(*parts)
    return None


def _shortened(node: Node, prefix: str) -> Node:
    inputs = tuple(name.removeprefix(prefix) for name in node.inputs)
    return Node(node.name.removeprefix(prefix), node.op, inputs, node.attributes, node.tensors)


def _layer(node: Node, rank: int | None) -> nn.Module | None:
    """The layer that does what a node does; None for nodes that are not part of a chain."""
    how = node.attributes
    match node.op:
        case "normalize":
            layer = Normalize((0,), (1,))
            layer.offset, layer.scale = node.tensors["offset"], node.tensors["scale"]
            return layer
        case "conv" if all(before == after for before, after in how["padding"]):
            padding = [before for before, _ in how["padding"]]
            return convolution(node.tensors["weight"], node.tensors["bias"], **{**how, "padding": padding})
        case "linear":
            num_out, num_in = node.tensors["weight"].shape
            linear = nn.Linear(num_in, num_out, device="meta")
            linear.weight, linear.bias = (_fixed(node.tensors[key]) for key in ("weight", "bias"))
            return linear
        case "relu":
            return nn.ReLU()
        case "ncrelu":
            return NCReLU() if rank is None else NCReLU(dims=rank - 2)
        case "max_pool" if _is_square(node):
            return nn.MaxPool2d(how["size"][0], how["stride"][0], how["padding"][0])
        case "global_pool" if rank in (None, 4):
            return nn.AdaptiveAvgPool2d(1)
        case "flatten":
            return nn.Flatten()
        case _ if len(node.inputs) == 1 and not node.tensors and node.op != "conv":
            return Operation(node)
        case _:
            return None


def _is_square(pool: Node) -> bool:
    """Whether the pool is `nn.MaxPool2d` with one number for both dimensions and no other settings."""
    how = pool.attributes
    is_square = all(len({*how[key]}) == 1 for key in ("size", "stride", "padding"))
    return len(how["size"]) == 2 and is_square and not how["ceil"] and {*how["dilation"]} == {1}
