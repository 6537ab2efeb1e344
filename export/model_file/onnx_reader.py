"""Reads an ONNX file from its bytes, without any library. The file may be damaged or hostile."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from common.documents import read_fields, read_json, read_object, read_varint
from common.files import sha256
from common.refusal import Refusal
from common.spec import Spec
from export.model_file.reference import KEY

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_METADATA = 7, 8, 14
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_TYPE, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_I, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 1, 3, 5, 6
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13
_KEY, _VALUE = 1, 2  # of an entry of metadata or of an external location; the domain of an opset is also 1
_INT8, _FLOAT16, _BFLOAT16, _FLOAT8 = 3, 10, 16, 17  # of TensorProto.DataType; float8 is E4M3FN

_SECTIONS = ("training", "fold", "export")  # of the provenance
PASSES_ON = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}  # values unchanged


@dataclass(frozen=True)
class Header:
    metadata: dict[str, str]  # "spec" and "provenance", as JSON, in a file of this project
    domains: tuple[str, ...]  # of its operators; "" is ONNX's own

    @property
    def spec(self) -> Spec | None:
        """None in a third-party file."""
        return Spec.from_json(self.metadata["spec"]) if "spec" in self.metadata else None

    @property
    def provenance(self) -> dict[str, Any]:
        """The records of training, fold and export, empty in a third-party file; and the reference, if any."""
        record: dict[str, Any] = {}
        if "spec" in self.metadata:
            what = "the provenance in the model's file"
            record = read_object(self.metadata.get("provenance", "{}"), what, todo="export it again")
            if bad := [name for name in _SECTIONS if not isinstance(record.get(name, {}), dict)]:
                raise Refusal(f"{what} is damaged: {bad[0]} is not a JSON object; export it again")
        if KEY in self.metadata:
            record[KEY] = self.metadata[KEY]
            with suppress(ValueError):  # `read_reference` checks it where it is used
                record[KEY] = read_json(self.metadata[KEY])
        return record


@dataclass(frozen=True)
class Node:
    name: str
    kind: str  # "Conv"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[str, int]  # its attributes that are a single integer


@dataclass(frozen=True)
class OnnxGraph:
    nodes: tuple[Node, ...]  # of the main graph
    types: frozenset[int]  # of its weights
    weight_files: tuple[str, ...]  # as the file names them; () where all weights are inside

    @property
    def precision(self) -> str:
        """fp32, fp16, bf16, fp8 or int8: what its convolutions compute in."""
        if any(node.kind == "DequantizeLinear" for node in self.nodes):
            return "fp8" if _FLOAT8 in self.types else "int8"
        return "bf16" if _BFLOAT16 in self.types else "fp16" if _FLOAT16 in self.types else "fp32"

    def last_kind(self, output: str) -> str:
        """The kind of the node that computes `output`, ignoring nodes that only pass it on; "" if there is none."""
        makers = {name: node for node in self.nodes for name in node.outputs}
        node = makers.get(output)
        while node and node.kind in PASSES_ON and node.inputs:
            node = makers.get(node.inputs[0])
        return node.kind if node else ""

    def in_training_mode(self) -> list[str]:
        """The names of batch norms that normalize with the statistics of the current batch."""
        norms = [node for node in self.nodes if node.kind == "BatchNormalization"]
        training = [node for node in norms if node.numbers.get("training_mode") or sum(map(bool, node.outputs)) > 1]
        return [node.name or node.outputs[0] for node in training]


def read_header(path: Path, content: bytes) -> Header:
    """The header of an ONNX file; refuses damage, naming `path`."""
    with _refusing_damage(path):
        model = _parse(memoryview(content))
        entries = [_parse(entry) for entry in model[_MODEL_METADATA]]
        domains = tuple(_text(_parse(opset), _KEY) for opset in model[_MODEL_OPSETS])
        return Header({_text(entry, _KEY): _text(entry, _VALUE) for entry in entries}, domains)


def read_graph(path: Path, content: bytes) -> OnnxGraph:
    """The main graph of an ONNX file; refuses damage, naming `path`."""
    model = memoryview(content)
    with _refusing_damage(path):
        nodes = tuple(_read_node(message) for message in _inside(model, _MODEL_GRAPH, _GRAPH_NODE))
        weights = map(_parse, _inside(model, _MODEL_GRAPH, _GRAPH_INITIALIZER))
        types = frozenset(kind for fields in weights for kind in fields[_TENSOR_TYPE])
        names = {name for graph in _inside(model, _MODEL_GRAPH) for name in _weight_files(graph)}
        return OnnxGraph(nodes, types, tuple(sorted(names)))


def read_int8_constants(content: bytes) -> dict[str, np.ndarray | None]:
    """The main graph's constants by name: int8 arrays, and None for all others. Damaged ones are left out."""
    found: dict[str, np.ndarray | None] = {}
    for tensor in _inside(memoryview(content), _MODEL_GRAPH, _GRAPH_INITIALIZER):
        with suppress(ValueError, IndexError, TypeError):
            fields = _parse(tensor)
            dims = [
                size for part in fields[_TENSOR_DIMS] for size in ([part] if isinstance(part, int) else _unpack(part))
            ]
            *_, raw = fields[_TENSOR_RAW] or [b""]
            is_int8 = fields[_TENSOR_TYPE] == [_INT8] and raw and dims and len(raw) == prod(dims)
            found[_text(fields, _TENSOR_NAME)] = np.frombuffer(raw, np.int8).reshape(dims) if is_int8 else None
    return found


def find_weights(path: Path, graph: OnnxGraph) -> list[Path]:
    """The files that hold a graph's weights; refuses those that are missing or outside the model's folder."""
    folders = {path.parent.resolve(), path.resolve().parent}
    files = {name: path.parent / name for name in graph.weight_files}
    for name, file in files.items():
        if not any(file.resolve().is_relative_to(folder) for folder in folders):
            raise Refusal(f"{path} names the weight file {name}, which is outside its folder; export the net again")
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise Refusal(f"{path} lacks its weights, {', '.join(missing)}: put them beside it, or export it as one file")
    return [*files.values()]


def digest_of(path: Path, content: bytes) -> str:
    """The sha256 of a file. If its weights are in separate files, the sha256 of all their digests, one a line."""
    digests = [sha256(content)]
    for file in find_weights(path, read_graph(path, content)) if path.suffix == ".onnx" else []:
        try:
            with file.open("rb") as weights:
                digests.append(hashlib.file_digest(weights, "sha256").hexdigest())
        except OSError as error:
            raise Refusal(f"cannot read {file}: {error.strerror or error}") from error
    return digests[0] if len(digests) == 1 else sha256("\n".join(digests).encode())


def with_metadata(path: Path, content: bytes, entries: Mapping[str, str | None]) -> bytes:
    """An ONNX file with other metadata entries, or without those that are None; all other bytes stay as they are.

    The entries come last: the order of the fields has no meaning. Needs onnx.
    """
    from onnx import ModelProto, StringStringEntryProto

    read_header(path, content)  # refuses damage
    kept = bytearray(content)
    for number, value, place in reversed([*read_fields(content)]):
        if number == _MODEL_METADATA and isinstance(value, memoryview) and _text(_parse(value), _KEY) in entries:
            del kept[place]
    added = [StringStringEntryProto(key=key, value=value) for key, value in entries.items() if value is not None]
    return bytes(kept) + ModelProto(metadata_props=added).SerializeToString()


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise Refusal(f"{path} is not a valid ONNX file: its encoding is damaged; export it again") from error


def _read_node(message: memoryview) -> Node:
    node = _parse(message)
    inputs, outputs = (tuple(str(name, "utf-8") for name in node[number]) for number in (_NODE_INPUT, _NODE_OUTPUT))
    attributes = [_parse(attribute) for attribute in node[_NODE_ATTRIBUTE]]
    numbers = {
        _text(fields, _ATTRIBUTE_NAME): fields[_ATTRIBUTE_I][-1] for fields in attributes if fields[_ATTRIBUTE_I]
    }
    return Node(_text(node, _NODE_NAME), _text(node, _NODE_TYPE), inputs, outputs, numbers)


def _weight_files(graph: memoryview) -> Iterator[str]:
    """The external files of weights, and of constants of nodes and of the graphs inside them."""
    attribute = (_GRAPH_NODE, _NODE_ATTRIBUTE)
    for entry in chain(
        _inside(graph, _GRAPH_INITIALIZER, _TENSOR_EXTERNAL),
        _inside(graph, *attribute, _ATTRIBUTE_TENSOR, _TENSOR_EXTERNAL),
    ):
        if _text(pair := _parse(entry), _KEY) == "location":
            yield _text(pair, _VALUE)
    for inner in _inside(graph, *attribute, _ATTRIBUTE_GRAPH):
        yield from _weight_files(inner)


Fields = dict[int, list[Any]]  # number → contents, memoryviews or integers


def _parse(message: memoryview) -> Fields:
    fields = defaultdict(list)
    for number, content, _ in read_fields(message):
        if content is not None:
            fields[number].append(content)
    return fields


def _text(fields: Fields, number: int) -> str:
    return str(fields[number][-1], "utf-8") if fields[number] else ""


def _inside(message: memoryview, *path: int) -> Iterator[memoryview]:
    """All messages that are reached along a path of field numbers."""
    for value in _parse(message)[path[0]]:
        yield from _inside(value, *path[1:]) if path[1:] else (value,)


def _unpack(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = read_varint(message, at)
        yield value
