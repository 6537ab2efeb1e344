"""Why TensorRT refuses a graph: its messages as nodes, operators and types, and what to do about them."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from common.refusal import first_of
from export.graphs.onnx_file import FLOATS, dtype_name


class TypedGraph:
    """A graph with the types and constants that its nodes read."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        values = [*graph.input, *graph.value_info, *graph.output]
        self.nodes = list(graph.node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types |= {name: tensor.data_type for name, tensor in self._constants.items()}

    def types(self, node: NodeProto) -> list[int]:
        """Element types of a node's inputs, in their order; omitted inputs have none."""
        return [self._types.get(name, TensorProto.UNDEFINED) for name in node.input if name]

    def constant(self, node: NodeProto, index: int) -> np.ndarray:
        """The weight that is a node's input; empty where there is none, or a computed tensor."""
        name = node.input[index] if index < len(node.input) else ""
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else np.empty(0)

    def concerned(self, rule: "Rule") -> dict[str, NodeProto]:
        """Nodes by their output."""
        return {node.output[0]: node for node in self.nodes if rule.concerns(node, self)}

    def shown(self, node: NodeProto) -> str:
        """A node with its input types, for messages."""
        name = f"'{node.name}'" if node.name else f"that writes '{node.output[0]}'"
        types = ", ".join(dtype_name(kind) for kind in self.types(node))
        return f"{node.op_type} {name}" + (f" ({types})" if types else "")


@dataclass(frozen=True)
class Rule:
    """One kind of message. The parser stops at the first node of most kinds; `concerns` finds the others."""

    pattern: str  # in the message
    advice: str  # the reason, which quotes groups of the pattern, and what to do
    concerns: Callable[[NodeProto, TypedGraph], bool] = lambda node, graph: False


_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
# Operators whose inputs must have one type.
_OF_ONE_TYPE = ("Add", "Concat", "Conv", "ConvTranspose", "Div", "Gemm", "MatMul", "Max", "Min", "Mul", "Sub", "Sum")
OUR_INT8 = "export with --precision int8 --target tensorrt (export/to_onnx.py)"
PARSER_RULES = (
    Rule(
        r"has type UInt8 but must",
        "reads uint8, which in TensorRT only Cast can; do: cast to float first, then transpose and compute",
        lambda node, graph: graph.types(node)[:1] == [TensorProto.UINT8] and node.op_type not in ("Cast", *_QUANTIZERS),
    ),
    Rule(
        r"has type Int32 but must have type FP8",
        f"its bias is quantized to int32; do: {OUR_INT8}, or with QuantizeBias=False in ONNX Runtime's quantizer",
        lambda node, graph: node.op_type == "DequantizeLinear" and graph.types(node)[:1] == [TensorProto.INT32],
    ),
    Rule(
        r"Non-zero zero point",
        "its zero point is not 0; "
        f"do: {OUR_INT8}, or with ActivationSymmetric=True and WeightSymmetric=True in ONNX Runtime's quantizer",
        lambda node, graph: node.op_type in _QUANTIZERS and bool(graph.constant(node, 2).astype(float).any()),
    ),
    Rule(
        r"unsupported input type of UINT8",
        "its weights are quantized to uint8, and TensorRT has only int8; "
        f"do: {OUR_INT8}, or with weight_type=QInt8 in ONNX Runtime's quantizer",
        lambda node, graph: node.op_type == "DequantizeLinear" and graph.constant(node, 0).dtype == np.uint8,
    ),
    Rule(
        r"must be of same type|must have same input types",
        "its inputs differ in type, and a strongly typed build converts none of them; "
        "do: put a Cast before it, or export the whole net in one precision",
        lambda node, graph: node.op_type in _OF_ONE_TYPE and len({*FLOATS} & {*graph.types(node)}) > 1,
    ),
    Rule(
        r"^false$|Plugin not found|not found in plugin registry",
        "TensorRT has no such operator; do: replace it in the net with operators that TensorRT has, or serve the .onnx",
    ),
    Rule(
        r"(?s)Failed to import initializer.*: (\S+)$",
        "TensorRT cannot read its weight {0}; do: keep weights to float, int8, int32, int64 and bool",
    ),
    Rule(r"Unsupported data type", "TensorRT has no such type; do: keep to float, int8, int32, int64 and bool"),
)
# Seen in the graph, because the parser silently takes uint8 for int8.
GRAPH_RULES = (
    Rule(
        r"",
        "quantizes to uint8, which TensorRT reads as int8: values beyond 127 are cut off; "
        f"do: {OUR_INT8}, or with activation_type=QInt8 in ONNX Runtime's quantizer",
        lambda node, graph: (  # without a zero point or a type of its own, a quantizer's output is uint8
            node.op_type == "QuantizeLinear"
            and graph.types(node)[2:] in ([], [TensorProto.UINT8])
            and not any(attribute.name == "output_dtype" for attribute in node.attribute)
        ),
    ),
    Rule(
        r"",
        f"computes in integers, which only ONNX Runtime does; do: {OUR_INT8}",
        lambda node, graph: (
            node.domain == "com.microsoft" or node.op_type.startswith("QLinear") or node.op_type.endswith("Integer")
        ),
    ),
)
BUILD_RULES = (
    Rule(
        r"Cannot compile operation '(.*?)' for Turing",
        "compute capability 7.5 has no kernel for {0} in this precision; "
        "do: leave 7.5 out of --compute-capability, or export the net in fp16",
    ),
    Rule(
        r"Cannot compile for target\(s\) (.*?), because .* datatypes: (\w+)",
        "GPUs of {0} have no {1}; do: name only others with --compute-capability, or export the net in fp16",
    ),
    Rule(
        r"libnvinfer_lean",
        "a version-compatible engine carries the lean runtime, which is not installed here; "
        "do: pip install tensorrt-lean, or leave out --version-compatible",
    ),
    Rule(
        r"(?i)workspace|OutOfMemory",
        "the builder has too little memory for its scratch space; do: give a larger --workspace",
    ),
)


def parser_advice(model: onnx.ModelProto, errors: Iterable[Any]) -> str:
    """All objections to a graph in one line, by kind, with the nodes concerned; "" if there are none.

    `errors` are the parser's own error objects.
    """
    graph = TypedGraph(model)
    concerned: dict[str, dict[str, NodeProto]] = defaultdict(dict)  # by the advice: nodes by their output
    for rule in GRAPH_RULES:
        if nodes := graph.concerned(rule):
            concerned[rule.advice].update(nodes)
    explained = {name for nodes in concerned.values() for name in nodes}
    for error in errors:
        culprit = _culprit(error, graph)
        if explained.isdisjoint(culprit):
            rule = _match(PARSER_RULES, error.desc())
            concerned[rule.advice].update(culprit | graph.concerned(rule))
    return "; ".join(
        f"{first_of([graph.shown(node) for node in nodes.values()], 8) or 'the graph'}: {advice}"
        for advice, nodes in concerned.items()
    )


def build_advice(message: str) -> str:
    """The meaning of the builder's last error, and what to do."""
    return _match(BUILD_RULES, message).advice


def _match(rules: tuple[Rule, ...], message: str) -> Rule:
    """The rule of a message with its advice filled in; an unknown message is quoted, shortened."""
    for rule in rules:
        if found := re.search(rule.pattern, message):
            return replace(rule, advice=rule.advice.format(*found.groups()))
    return Rule("", f"{_shortened(message)}; do: change what the message names, and export the net again")


def _culprit(error: Any, graph: TypedGraph) -> dict[str, NodeProto]:
    """The node of an error, by its output. Functions and branches count nodes anew: then only its name is known."""
    index, kind, name = error.node(), error.node_operator(), error.node_name()
    if index < 0:
        return {}
    node = graph.nodes[index] if index < len(graph.nodes) else None
    if node is None or (node.op_type, node.name) != (kind, name):
        node = helper.make_node(kind, [], [name], name=name)
    return {node.output[0]: node}


def _shortened(message: str) -> str:
    """A message of the library without places in its source code and trailing CUDA errors."""
    quoted = re.search(r'&& ?((?:"[^"]*"\s*)+)', message)
    text = quoted[1].replace('"', "") if quoted else message
    text = re.sub(r"\[checkMacros.*|^Invalid Node - .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\S+: Error Code \d+: [\w ]+ \(|\s?In \S+ at \S+\)|Assertion failed: .*?: (?=[A-Z])", "", text)
    return " ".join(text.split()).rstrip(".!")[:240]
