"""What a classifier is, for every command: one input of images, one output with a value for each class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.refusal import Refusal
from common.spec import Spec
from export.model_file.described import NOTHING, Described, said_of
from export.model_file.header import Header
from export.model_file.nodes import Graph
from export.model_file.signature import Signature, generic_spec, read_as

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Value:
    """An input or output of a graph."""

    name: str
    dtype: str  # as numpy spells it
    shape: tuple[int | None, ...]  # None where it is free

    @property
    def num_classes(self) -> int | None:
        """Of an output [N, K], or [N, K, 1, 1]; 1 where it is no classifier's, None where the graph does not say."""
        if self.dtype not in _FLOATS or len(self.shape) < 2 or any(size not in (1, None) for size in self.shape[2:]):
            return 1
        return self.shape[1]


def find_signature(
    path: Path, header: Header, graph: Graph, inputs: Sequence[Value], outputs: Sequence[Value], by_user: Described
) -> tuple[Signature, Described]:
    """The signature of the classifier in `path`, and all that is said of it. Refuses every other graph."""
    said = _said(path, header, by_user)
    if len(inputs) != 1:
        raise Refusal(f"{path} has {len(inputs)} inputs; a classifier has one, of images")
    if nodes := graph.in_training_mode():
        raise Refusal(
            f"{path} was exported in training mode: the batch norm {nodes[0]} normalizes with the other images of its "
            "batch, so that an image's answer depends on them; call net.eval() and export it again"
        )
    try:
        output = _choose(outputs, said.output)
        signature = Signature(inputs[0].name, output.name, inputs[0].dtype, inputs[0].shape)
        if header.spec is None:
            reading = read_as(signature, said, last_kind=graph.last_kind(output.name))
            signature = replace(signature, reading=reading)
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from refusal
    return signature, said


def find_spec(path: Path, header: Header, signature: Signature, said: Described, num_classes: int) -> Spec:
    """The spec of the file, or what is said in its place; refuses labels that do not fit."""
    if num_classes < 2:
        raise Refusal(f"{path} gives {num_classes} value per image; a classifier gives one per class")
    try:
        spec = header.spec or generic_spec(
            signature, num_classes=num_classes, labels=said.labels, temperature=said.temperature
        )
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from refusal
    if len(spec.labels) != num_classes:
        raise Refusal(
            f"{path}: its spec has {len(spec.labels)} labels, its graph {num_classes} logits; export it again"
        )
    return spec


def _said(path: Path, header: Header, by_user: Described) -> Described:
    if header.spec is None:
        return said_of(path, header.metadata, by_user)
    if by_user.sources:
        names = ", ".join(f"--{name}" for name, _ in by_user.sources)
        raise Refusal(f"{path} says itself how it is read; leave {names} out")
    return NOTHING


def _choose(outputs: Sequence[Value], asked: str | None) -> Value:
    """The output that holds the classes: the one asked for, or the only one that can."""
    names = ", ".join(output.name for output in outputs)
    if asked is not None and asked not in {output.name for output in outputs}:
        raise Refusal(f"it has no output {asked}; choose one of {names} with --output")
    able = [output for output in outputs if (output.num_classes or 2) > 1 and asked in (None, output.name)]
    if not able:
        shown = "; ".join(
            f"{output.name} {output.dtype} {[size or 'N' for size in output.shape]}" for output in outputs
        )
        raise Refusal(f"it answers {shown}; a classifier answers [N, K], one float for each of its K classes")
    if len(able) > 1:
        raise Refusal(f"it has the outputs {names}; choose the one that holds the classes with --output NAME")
    return able[0]
