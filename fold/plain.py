"""The file of a plain net, plain.safetensors."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from common.documents import read_object
from common.files import write_whole
from common.refusal import Refusal, first_of, one_line
from common.spec import Spec
from fold.graph import GraphNet, fold
from fold.nodes import Graph
from fold.shapes import infer_shapes
from train.checkpoint import GRAPH_FORMAT, PLAIN_FORMAT, PlainFile, misfits, read_plain_file
from train.families import outline
from train.layers import Normalize

NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
RESERVED = ("images", "logits")  # the input and output of an exported net


@dataclass(frozen=True)
class Plain:
    """A plain net read from its file."""

    net: GraphNet
    spec: Spec
    provenance: dict[str, Any]
    sha256: str


def skeleton(spec: Spec) -> Graph:
    """The plain net of `spec`, in float32; all tensors but those of its normalisation are on the meta device."""
    net = outline(spec).eval()
    net.normalize = Normalize(spec.image.mean, spec.image.std)
    return fold(net).graph.convert(torch.float32)


def stored_tensors(graph: Graph, spec: Spec) -> dict[str, Tensor]:
    """The tensors of a plain net's file by name: all, or those that a spec which builds the net does not give."""
    nodes = (node for node in graph.nodes if spec.net or node.op != "normalize")
    return Graph(tuple(nodes)).tensors()


def save_plain(path: Path, net: GraphNet, spec: Spec, provenance: dict[str, Any]) -> None:
    """Write plain.safetensors: weights and biases, with the spec and the provenance in the header.

    For a net that the spec does not build, the header has the graph as well: names, operations, attributes.
    Refuses, before it writes, what `infer_shapes` refuses.
    """
    metadata = {"format": PLAIN_FORMAT, "spec": spec.to_json(), "provenance": json.dumps(provenance)}
    if spec.net:
        _check(net.graph, spec)
        metadata |= {"format": GRAPH_FORMAT, "graph": json.dumps(net.graph.to_dict())}
    tensors = stored_tensors(net.graph, spec)
    write_whole(path, save({name: tensor.float().contiguous() for name, tensor in tensors.items()}, metadata))


def load_plain(path: Path) -> Plain:
    """The inverse of `save_plain`; refuses a file that is not a whole plain net, or contains NaN or Inf."""
    file = read_plain_file(path)
    try:
        net = GraphNet(_read_graph(file)).eval()
    except Refusal as refusal:
        raise Refusal(f"{path}: {one_line(refusal, 500)}") from refusal  # a name in it may have line breaks
    except (ValueError, RecursionError, KeyError, AttributeError) as error:  # the last two: two tensors of one name
        raise Refusal(f"{path} is damaged: {one_line(error)}; make it again") from error
    record = file.metadata.get("provenance", "{}")
    provenance = read_object(record, f"the provenance in {path}", todo="fold the net again")
    return Plain(net, file.spec, provenance, file.sha256)


def _read_graph(file: PlainFile) -> Graph:
    if file.spec.net:
        graph = Graph.from_dict(json.loads(file.metadata.get("graph", "")), file.weights)
        _check(graph, file.spec)
        return graph
    graph = skeleton(file.spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(graph, file.spec).items()}
    if wrong := misfits(file.weights, shapes):
        raise Refusal(f"the plain file does not fit its spec {file.spec.name}: {first_of(wrong)}")
    return graph.with_tensors(file.weights)


def _check(graph: Graph, spec: Spec) -> None:
    """Refuses a graph that does not lead from the images of its spec to logits."""
    if wrong := [node.name for node in graph.nodes if not NAME.fullmatch(node.name) or node.name in RESERVED]:
        raise Refusal(f"{wrong[0][:80]!r} cannot be the name of a node")
    shapes = infer_shapes(graph, spec.image.shape)
    if wrong := [node.name for node in graph.readers(graph.nodes[0].name) if node.op != "normalize"]:
        raise Refusal(f"{wrong[0]}: a plain net of images begins with normalize")
    last, num = graph.nodes[-1].name, len(spec.labels)
    if shapes[last] != (num,):
        raise Refusal(f"{last} gives {list(shapes[last])} for each image, and there are {num} labels")
