"""From a net to its plain form, a chain of layers or a graph, and the file of a plain net."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from common.documents import read_object
from common.files import write_whole
from common.refusal import Refusal, one_line
from common.spec import Spec
from fold.graph import GraphNet
from fold.layers import as_sequential
from fold.nodes import Graph
from fold.rules import simplify
from fold.shapes import infer_shapes
from fold.tracing import trace
from train.families import outline
from train.fine_tune.plain_file import FORMAT, GRAPH_FORMAT, read_plain_file
from train.layers import Normalize

PlainNet = nn.Sequential | GraphNet  # layers for a net that a spec builds, a graph for any other
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
    metadata = {"format": FORMAT, "spec": spec.to_json(), "provenance": json.dumps(provenance)}
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
            net = _graph_net(metadata.get("graph", ""), weights, spec)
        else:
            net = skeleton(spec)
            net.load_state_dict(weights, assign=True)
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from refusal
    except ValueError as error:
        raise Refusal(f"{path} is damaged: {one_line(error)}; make it again") from error
    except RuntimeError as error:
        raise Refusal(f"{path} does not fit its spec: {one_line(error)}") from error
    provenance = read_object(metadata.get("provenance", "{}"), f"the provenance in {path}", todo="fold the net again")
    return Plain(net.eval(), spec, provenance, file.sha256)


def _graph_net(text: str, weights: dict[str, Tensor], spec: Spec) -> GraphNet:
    """The net of a header's graph, which is data and checked like any input."""
    try:
        entries = json.loads(text)
    except RecursionError as error:
        raise ValueError("the graph is nested too deeply") from error
    graph = Graph.from_dict(entries, weights)
    _check(graph, spec)
    try:
        return GraphNet(graph)
    except (KeyError, AttributeError) as error:  # a node has the name of another's tensor
        raise ValueError(f"two tensors have one name: {error}") from error


def _check(graph: Graph, spec: Spec) -> None:
    """Refuses a graph that does not lead from the images of its spec to logits."""
    image = spec.image
    wrong = [node.name for node in graph.nodes if not NAME.fullmatch(node.name) or node.name in RESERVED]
    if wrong:
        raise Refusal(f"{wrong[0][:80]!r} cannot be the name of a node")
    shapes = infer_shapes(graph, (image.height, image.width, image.channels))
    if any(node.op != "normalize" for node in graph.readers(graph.nodes[0].name)):
        raise Refusal(f"{graph.nodes[1].name}: a plain net of images begins with normalize")
    last, num = graph.nodes[-1].name, len(spec.labels)
    if shapes[last] != (num,):
        raise Refusal(f"{last} gives {list(shapes[last])} for each image, and there are {num} labels")
