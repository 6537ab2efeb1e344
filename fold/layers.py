"""From a graph to named layers: a chain, with sums of two branches, as an `nn.Sequential`."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fold.nodes import Graph, Node, run
from train.layers import NCReLU, Normalize, Residual

Layers = list[tuple[str, nn.Module]]
CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Operation(nn.Module):
    """A node without numbers and with one input, as a layer."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        return run(self.node, [x])

    def extra_repr(self) -> str:
        return self.node.op


def as_sequential(graph: Graph) -> nn.Sequential:
    """The layers of a chain by the nodes' names; raises TypeError, with the names, where it is none."""
    before, wrong = graph.nodes[0].name, list[str]()
    layers: Layers = []
    rest = list(graph.nodes[1:])
    while rest:
        branches = _branches(graph, rest, before)
        if branches:
            node, parts = branches
            layers.append((node.name, Residual(*parts)))
            rest = rest[rest.index(node) + 1 :]
        else:
            node = rest.pop(0)
            layer = _layer(node, graph.rank(node.name))
            if layer is None or node.inputs != (before,):
                wrong.append(f"{node.name} ({node.op})")
            layers.append((node.name, layer or nn.Identity()))
        before = node.name
    if wrong:
        raise TypeError(f"no chain of layers: {', '.join(wrong)}; fold.graph.fold takes such nets")
    return nest(layers)


def nest(layers: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    """Layers with dotted names as nested sequences: the inverse of `named_layers`.

    Raises TypeError where sequences of these names would run in another order, or one would be inside a layer.
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
                raise TypeError(
                    f"no chain of layers: {name} runs apart from its module; fold.graph.fold takes such nets"
                )
            place = place.get_submodule(part)
        if leaf in dict(place.named_children()):
            raise TypeError(f"no chain of layers: {name} is a layer and a module; fold.graph.fold takes such nets")
        place.add_module(leaf, layer)
        before = parts
    return net.eval()


def _branches(graph: Graph, rest: list[Node], source: str) -> tuple[Node, list[nn.Sequential]] | None:
    """The sum whose branches come next, and they: those of a `Residual`, named after it."""
    first = rest[0].name
    for node in rest:
        if (
            node.op != "add"
            or len(node.inputs) != 2
            or not first.startswith((f"{node.name}.body.", f"{node.name}.shortcut."))
        ):
            continue
        inside = rest[: rest.index(node)]
        parts: list[nn.Sequential] = []
        for branch, end in zip(("body", "shortcut"), node.inputs, strict=True):
            prefix = f"{node.name}.{branch}."
            nodes = [part for part in inside if part.name.startswith(prefix)]
            ends = nodes[-1].name if nodes else source
            if end != ends:
                return None
            start = Node(source, "input", (), {"rank": graph.rank(source)})
            short = [start, *nodes]
            parts.append(as_sequential(Graph(tuple(_shortened(part, prefix) for part in short))))
        if sum(len(list(part.modules())) for part in parts) and len(inside) == sum(
            part.name.startswith((f"{node.name}.body.", f"{node.name}.shortcut.")) for part in inside
        ):
            return node, parts
    return None


def _shortened(node: Node, prefix: str) -> Node:
    inputs = tuple(name.removeprefix(prefix) for name in node.inputs)
    return Node(node.name.removeprefix(prefix), node.op, inputs, node.attributes, node.tensors)


def _layer(node: Node, rank: int | None) -> nn.Module | None:
    """The layer of PyTorch's that does what a node does, where a plain net of ours has it; None for other nodes."""
    how = node.attributes
    match node.op:
        case "normalize":
            layer = Normalize((0,), (1,))
            layer.offset, layer.scale = node.tensors["offset"], node.tensors["scale"]
            return layer
        case "conv" if all(before == after for before, after in how["padding"]):
            return _convolution(node)
        case "linear":
            weight = node.tensors["weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            return _filled(layer, node)
        case "relu":
            return nn.ReLU()
        case "ncrelu":
            return NCReLU() if rank is None else NCReLU(dims=rank - 2)
        case "max_pool" if len(how["size"]) == 2 and not how["ceil"] and {*how["dilation"]} == {1} and _square(node):
            return nn.MaxPool2d(how["size"][0], how["stride"][0], how["padding"][0])
        case "global_pool" if rank in (None, 4):
            return nn.AdaptiveAvgPool2d(1)
        case "flatten":
            return nn.Flatten()
        case _ if len(node.inputs) == 1 and not node.tensors and node.op != "conv":
            return Operation(node)
        case _:
            return None


def _square(node: Node) -> bool:
    return all(len({*node.attributes[key]}) == 1 for key in ("size", "stride", "padding"))


def _convolution(node: Node) -> nn.Module:
    how, weight = node.attributes, node.tensors["weight"]
    layer = CONVOLUTIONS[weight.dim()](
        weight.shape[1] * how["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=tuple(how["stride"]),
        padding=tuple(before for before, _ in how["padding"]),
        dilation=tuple(how["dilation"]),
        groups=how["groups"],
        device="meta",
    )
    return _filled(layer, node)


def _filled(layer: nn.Module, node: Node) -> nn.Module:
    for key in ("weight", "bias"):
        value = node.tensors[key]
        setattr(layer, key, nn.Parameter(value, requires_grad=False))
    return layer
