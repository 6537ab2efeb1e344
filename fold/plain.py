"""The plain form of a net: a chain of named layers or a graph, and its file."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from common.documents import read_object
from common.files import write_whole
from common.refusal import Refusal, one_line
from common.spec import Spec
from fold.graph import GraphNet
from fold.nodes import Graph, Node, run
from fold.rules import simplify
from fold.shapes import infer_shapes
from fold.tracing import trace
from train.checkpoint import GRAPH_FORMAT, PLAIN_FORMAT, read_plain_file
from train.families import outline
from train.layers import NCReLU, Normalize, Residual

PlainNet = nn.Sequential | GraphNet  # layers for a net that a spec builds, a graph for any other
Layers = list[tuple[str, nn.Module]]  # as `named_layers` gives them
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
# By the number of the weight's dimensions.
CONVOLUTIONS: dict[int, Callable[..., Convolution]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
RESERVED = ("images", "logits")  # the input and output of an exported net


@dataclass(frozen=True)
class Plain:
    """A plain net read from its file."""

    net: PlainNet
    spec: Spec
    provenance: dict[str, Any]
    sha256: str


def fold_net(net: nn.Module) -> nn.Sequential:
    """A plain net in float64 with the outputs of `net` in evaluation mode, as a chain of layers; `net` stays as it was.

    Layers keep their names; fold/rules.py says what is merged. Raises TypeError that names all layers that
    fold/operations.py does not list, and for a net that is not a chain: `fold.graph.fold` takes those.
    """
    return as_sequential(simplify(trace(net)))


def named_layers(net: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The leaves of nested sequences, with dotted names, in the order in which they run."""
    for name, layer in net.named_children():
        if isinstance(layer, nn.Sequential):
            yield from named_layers(layer, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer


def skeleton(spec: Spec) -> nn.Sequential:
    """The plain net of `spec` without weights, on the meta device."""
    plain = fold_net(outline(spec).eval()).float()
    plain.normalize = Normalize(spec.image.mean, spec.image.std)
    return plain


def save_plain(path: Path, net: PlainNet, spec: Spec, provenance: dict[str, Any]) -> None:
    """Write plain.safetensors: weights and biases, with the spec and the provenance in the header.

    For a net that the spec does not build, the header has the graph as well: names, operations, attributes.
    Refuses, before it writes, what `infer_shapes` refuses.
    """
    metadata = {"format": PLAIN_FORMAT, "spec": spec.to_json(), "provenance": json.dumps(provenance)}
    weights = net.state_dict()
    if isinstance(net, GraphNet):
        graph = net.with_tensors()
        _check(graph, spec)
        weights = graph.tensors()
        metadata |= {"format": GRAPH_FORMAT, "graph": json.dumps(graph.to_dict())}
    write_whole(path, save({name: tensor.float().contiguous() for name, tensor in weights.items()}, metadata))


def load_plain(path: Path) -> Plain:
    """The inverse of `save_plain`; refuses a file that is not a whole plain net, or contains NaN or Inf."""
    file = read_plain_file(path)
    metadata, weights, spec = file.metadata, file.weights, file.spec
    try:
        if spec.net:
            graph = Graph.from_dict(json.loads(metadata.get("graph", "")), weights)
            _check(graph, spec)
            net = GraphNet(graph)
        else:
            net = skeleton(spec)
            net.load_state_dict(weights, assign=True)
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from refusal
    except (ValueError, RecursionError, KeyError, AttributeError) as error:  # the last two: two tensors of one name
        raise Refusal(f"{path} is damaged: {one_line(error)}; make it again") from error
    except RuntimeError as error:
        raise Refusal(f"{path} does not fit its spec: {one_line(error)}") from error
    provenance = read_object(metadata.get("provenance", "{}"), f"the provenance in {path}", todo="fold the net again")
    return Plain(net.eval(), spec, provenance, file.sha256)


def _check(graph: Graph, spec: Spec) -> None:
    """Refuses a graph that does not lead from the images of its spec to logits."""
    wrong = [node.name for node in graph.nodes if not NAME.fullmatch(node.name) or node.name in RESERVED]
    if wrong:
        raise Refusal(f"{wrong[0][:80]!r} cannot be the name of a node")
    shapes = infer_shapes(graph, spec.image.shape)
    if any(node.op != "normalize" for node in graph.readers(graph.nodes[0].name)):
        raise Refusal(f"{graph.nodes[1].name}: a plain net of images begins with normalize")
    last, num = graph.nodes[-1].name, len(spec.labels)
    if shapes[last] != (num,):
        raise Refusal(f"{last} gives {list(shapes[last])} for each image, and there are {num} labels")


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
            layer = _layer(node, graph.ranks[node.name]) if node.inputs == (before,) else None
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
        before = rest[:index]
        if node.op != "add" or len(node.inputs) != 2 or not rest[0].name.startswith(tuple(prefixes)):
            continue
        if not all(part.name.startswith(tuple(prefixes)) for part in before):
            continue
        branches = [[part for part in before if part.name.startswith(prefix)] for prefix in prefixes]
        if node.inputs != tuple(nodes[-1].name if nodes else source for nodes in branches):
            return None
        start, parts = Node(source, "input", (), {"rank": graph.ranks[source]}), list[nn.Sequential]()
        for nodes, prefix in zip(branches, prefixes, strict=True):
            short = {part.name: part.name.removeprefix(prefix) for part in nodes}
            inside = (replace(part, name=short[part.name]).reading(short) for part in nodes)
            parts.append(as_sequential(Graph((start, *inside))))
        return node, Residual(*parts)
    return None


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
