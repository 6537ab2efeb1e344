"""The nodes of an ONNX file and the files that its weights lie in, read without any library."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.files import read_whole, sha256
from common.refusal import Refusal
from export.model_file.header import contents, every_field

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_TYPE, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_I, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 1, 3, 5, 6
_TENSOR_EXTERNAL = 13
_KEY, _VALUE = 1, 2

# Nodes that hand values on as they are, in another shape or type.
_HANDS_ON = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}


@dataclass(frozen=True)
class Node:
    name: str
    kind: str  # "Conv"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[str, int]  # its attributes that are one whole number


@dataclass(frozen=True)
class Graph:
    nodes: tuple[Node, ...]  # of the main graph
    weight_files: tuple[str, ...]  # as the file names them; () where all weights are inside

    def last_kind(self, output: str) -> str:
        """The kind of the node that computes `output`, behind those that only hand it on; "" where none does."""
        makers = {name: node for node in self.nodes for name in node.outputs}
        node = makers.get(output)
        while node and node.kind in _HANDS_ON and node.inputs:
            node = makers.get(node.inputs[0])
        return node.kind if node else ""

    def in_training_mode(self) -> list[str]:
        """Batch norms that normalize with the statistics of the batch itself."""
        return [
            node.name or node.outputs[0]
            for node in self.nodes
            if node.kind == "BatchNormalization"
            and (node.numbers.get("training_mode") or len([name for name in node.outputs if name]) > 1)
        ]


def read_graph(path: Path, content: bytes) -> Graph:
    """The main graph of an ONNX file; `path` is for the refusal of damage and of weights outside its folder."""
    try:
        graphs = [message for number, message in contents(memoryview(content)) if number == _MODEL_GRAPH]
        nodes = tuple(_node(message) for graph in graphs for message in _only(graph, _GRAPH_NODE))
        names = {name for graph in graphs for name in _weight_files(graph)}
    except (ValueError, IndexError, KeyError) as error:
        raise Refusal(f"{path} cannot be loaded as an ONNX model: its encoding is damaged; export it again") from error
    return Graph(nodes, tuple(sorted(names)))


def find_weights(path: Path, graph: Graph) -> list[Path]:
    """The files of a graph's weights; refuses those that are missing or lie outside the model's folder."""
    homes = {path.parent.resolve(), path.resolve().parent}
    files = [path.parent / name for name in graph.weight_files]
    for name, file in zip(graph.weight_files, files, strict=True):
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise Refusal(f"{path} names the weight file {name}, which is outside its folder; export the net again")
    if missing := [name for name, file in zip(graph.weight_files, files, strict=True) if not file.is_file()]:
        raise Refusal(
            f"{path} keeps weights in files of their own, and {', '.join(missing)} is not in {path.parent}; "
            "put them there together, or export the net into one file"
        )
    return files


def digest_of(path: Path, content: bytes) -> str:
    """The sha256 of a file; with weights in files of their own, of all of them: the digests' own digest."""
    if path.suffix != ".onnx":
        return sha256(content)
    files = find_weights(path, read_graph(path, content))
    if not files:
        return sha256(content)
    digests = [sha256(content), *(_digest(file) for file in files)]
    return sha256("\n".join(digests).encode())


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return sha256(read_whole(path))  # refuses in words


def _only(message: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in contents(message) if number == wanted)


def _node(message: memoryview) -> Node:
    fields: dict[int, list[str]] = {number: [] for number in (_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_TYPE)}
    for number, value in contents(message):
        if number in fields:
            fields[number].append(str(value, "utf-8"))
    attributes = [dict(every_field(attribute)) for attribute in _only(message, _NODE_ATTRIBUTE)]
    numbers = {
        str(attribute[_ATTRIBUTE_NAME], "utf-8"): value  # type: ignore[arg-type]
        for attribute in attributes
        if isinstance(value := attribute.get(_ATTRIBUTE_I), int)
    }
    name, kind = ("".join(fields[number]) for number in (_NODE_NAME, _NODE_TYPE))
    return Node(name, kind, tuple(fields[_NODE_INPUT]), tuple(fields[_NODE_OUTPUT]), numbers)


def _weight_files(graph: memoryview) -> Iterator[str]:
    """The locations of all tensors that lie outside: weights, and the constants of nodes and of graphs inside them."""
    for tensor in _only(graph, _GRAPH_INITIALIZER):
        yield from _locations(tensor)
    for node in _only(graph, _GRAPH_NODE):
        for attribute in _only(node, _NODE_ATTRIBUTE):
            for tensor in _only(attribute, _ATTRIBUTE_TENSOR):
                yield from _locations(tensor)
            for inner in _only(attribute, _ATTRIBUTE_GRAPH):
                yield from _weight_files(inner)


def _locations(tensor: memoryview) -> Iterator[str]:
    for entry in _only(tensor, _TENSOR_EXTERNAL):
        pair = dict(contents(entry))
        if bytes(pair[_KEY]) == b"location":
            yield str(pair.get(_VALUE, b""), "utf-8")
