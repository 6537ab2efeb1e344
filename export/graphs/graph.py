"""From a plain net to ONNX: one case per operation of its graph; nodes keep their names."""

import json
from collections.abc import Iterable, Mapping
from math import inf, pi, sqrt
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from common.refusal import Refusal
from common.spec import ImageSpec, Spec
from fold.graph import GraphNet
from fold.nodes import TENSORS, Graph, Node
from fold.shapes import Shape, infer_shapes, pooled

OPSET = 19  # the first with float8 types; ONNX Runtime and TensorRT 10 take it
IR_VERSION = 9
FLOATS = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
_SAME_NAME = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish", "mul": "Mul"}
_END = np.iinfo(np.int64).max  # of a slice without one


class GraphWriter:
    """ONNX nodes and weights of a plain net under construction. `tensor` is the output of the node written last."""

    def __init__(self, plain: Graph, image: ImageSpec, dtype: np.dtype = FLOATS["fp32"]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.tensor = "images"
        self.dtype = dtype  # of the weights of layers
        self.taken = {node.name for node in plain.nodes}  # names that `free` does not give
        self.outputs = {plain.nodes[0].name: self.tensor}  # the tensors of the plain net's nodes
        self.shapes = infer_shapes(plain, image.shape, most_values=inf)

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Append a node that reads `inputs` (default: the node before) and is named like its output."""
        self.nodes.append(helper.make_node(op, list(inputs or (self.tensor,)), [name], name=name, **attributes))
        self.tensor = name
        return name

    def part(self, op: str, name: str, *inputs: str) -> str:
        """A node of an operation that takes several."""
        return self.node(op, self.free(name), *inputs)

    def weight(self, name: str, value: Tensor | np.ndarray | float) -> str:
        """A layer's weights, in the graph's precision; refuses those that it cannot hold."""
        array = np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
        largest = float(np.abs(array).max(initial=0))
        if not largest <= float(np.finfo(self.dtype).max):
            raise Refusal(f"{name} holds {largest:.3g}, beyond {self.dtype}; export with --precision fp32")
        return self.constant(self.free(name), array.astype(self.dtype))

    def weights(self, node: Node) -> list[str]:
        """The weight of a layer and the bias, if it has one."""
        return [self.weight(f"{node.name}.{key}", node.tensors[key]) for key in TENSORS[node.op] if key in node.tensors]

    def constant(self, name: str, array: np.ndarray) -> str:
        """Numbers of exactly this type."""
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def integers(self, name: str, values: list[int]) -> str:
        """Integers that a node reads as its settings."""
        return self.constant(self.free(name), np.asarray(values, np.int64))

    def free(self, name: str) -> str:
        """`name`, or one like it that no node of the net has."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def to_onnx(net: GraphNet, spec: Spec, provenance: Mapping[str, Any], *, precision: str = "fp32") -> onnx.ModelProto:
    """images uint8 [N, H, W, C] → logits float32 [N, K], checked, with spec and provenance as metadata.

    `net` is a plain net (fold/graph.py) in any lowering (fold/lower.py); an operation that is not listed raises
    TypeError. `precision` is fp32 or fp16: of everything between normalisation and logits.
    """
    plain = net.graph.convert(torch.float32)
    graph = GraphWriter(plain, spec.image, FLOATS[precision])
    write_nodes(graph, plain.nodes[1:])
    return finish(graph, spec, provenance)


def finish(graph: GraphWriter, spec: Spec, provenance: Mapping[str, Any]) -> onnx.ModelProto:
    """The model of a graph whose last node gives the logits."""
    if graph.dtype != np.float32:
        graph.node("Cast", "logits", to=TensorProto.FLOAT)
    graph.nodes[-1].output[0] = "logits"
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *spec.image.shape])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(spec.labels)])
    body = helper.make_graph(graph.nodes, spec.name, [images], [logits], graph.initializers)
    domains = sorted({node.domain for node in graph.nodes} - {""})
    opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="diracnet-road")
    helper.set_model_props(model, {"spec": spec.to_json(), "provenance": json.dumps(provenance)})
    onnx.checker.check_model(model, full_check=True)
    return model


def set_provenance(model: onnx.ModelProto, provenance: Mapping[str, Any]) -> None:
    """Replace the provenance in the metadata."""
    entry = next(entry for entry in model.metadata_props if entry.key == "provenance")
    entry.value = json.dumps(provenance)


def write_nodes(graph: GraphWriter, nodes: Iterable[Node]) -> None:
    """Operations of the plain net, whose inputs are in `outputs`."""
    for node in nodes:
        _write_node(graph, node, [graph.outputs[name] for name in node.inputs], graph.shapes[node.inputs[0]])
        graph.outputs[node.name] = graph.tensor


def conv_window(node: Node) -> dict[str, Any]:
    """ONNX's attributes of a convolution."""
    how, kernel = node.attributes, list(node.tensors["weight"].shape[2:])
    more = {"dilations": how["dilation"], "group": how["groups"]}
    return {"kernel_shape": kernel, "strides": how["stride"], "pads": _pads(how["padding"]), **more}


def pool_window(node: Node, shape: Shape) -> dict[str, Any]:
    """ONNX's attributes of a pool that reads [C, ...] for one image.

    Where the last window reaches beyond the padding, ONNX is given padding that reaches as far: it takes no part in a
    maximum, nor in a mean that does not count it.
    """
    how, pairs = node.attributes, []
    dilation = how.get("dilation", [1] * len(how["size"]))
    windows = zip(shape[1:], how["size"], how["stride"], how["padding"], dilation, strict=True)
    for size, taps, stride, padding, gap in windows:
        num = pooled(size, taps, stride, padding, gap, ceil=how["ceil"])
        reach = (num - 1) * stride + gap * (taps - 1) + 1
        pairs.append([padding, max(padding, reach - size - padding)])
    window = {"kernel_shape": how["size"], "strides": how["stride"], "pads": _pads(pairs)}
    return window if {*dilation} == {1} else {**window, "dilations": dilation}


def _write_node(graph: GraphWriter, node: Node, inputs: list[str], shape: Shape) -> None:
    """The ONNX nodes of one operation; `shape` is that of its first input for one image."""
    name, x, how = node.name, inputs[0], node.attributes
    match node.op:
        case "normalize":
            _write_normalize(graph, name, node.tensors["offset"], node.tensors["scale"])
        case "conv":
            graph.node("Conv", name, x, *graph.weights(node), **conv_window(node))
        case "linear" if len(shape) == 1:
            graph.node("Gemm", name, x, *graph.weights(node), transB=1)
        case "linear":
            weight = graph.weight(f"{name}.weight", node.tensors["weight"].T)
            product = graph.part("MatMul", f"{name}.product", x, weight)
            graph.node("Add", name, product, graph.weight(f"{name}.bias", node.tensors["bias"]))
        case "affine":
            _write_affine(graph, node, x, shape)
        case "add":  # two at a time: runtimes fuse such a sum into a convolution
            for index, term in enumerate(inputs[1:-1], start=2):
                x = graph.part("Add", f"{name}.first{index}", x, term)
            graph.node("Add", name, x, inputs[-1])
        case "cat":
            graph.node("Concat", name, *inputs, axis=1)
        case "slice":
            ends = {"start": how["start"], "stop": _END if how["stop"] is None else how["stop"], "axis": 1}
            graph.node("Slice", name, x, *(graph.integers(f"{name}.{key}", [end]) for key, end in ends.items()))
        case "pad":
            graph.node("Pad", name, x, graph.integers(f"{name}.pads", _pads([[0, 0], [0, 0], *how["padding"]])))
        case "ncrelu":
            _write_ncrelu(graph, name, x)
        case "max_pool":
            graph.node("MaxPool", name, x, **pool_window(node, shape))
        case "avg_pool":
            _write_average_pool(graph, node, x, shape)
        case "flatten":
            graph.node("Flatten", name, x)
        case "global_pool":
            graph.node("GlobalAveragePool", name, x)
        case _ if node.op in _SAME_NAME:
            graph.node(_SAME_NAME[node.op], name, *inputs)
        case _:
            _write_activation(graph, node, x)


def _write_normalize(graph: GraphWriter, name: str, offset: Tensor, scale: Tensor) -> None:
    """Pixels → x, always in float32: the rounding of a pixel would be the largest of all."""
    # TensorRT lets only Cast read uint8, so the transposition comes after it.
    graph.node("Cast", f"{name}.cast", to=TensorProto.FLOAT)
    graph.node("Transpose", f"{name}.transpose", perm=[0, 3, 1, 2])
    graph.node("Sub", f"{name}.sub", graph.tensor, graph.constant(f"{name}.offset", offset.numpy()))
    graph.node("Mul", name, graph.tensor, graph.constant(f"{name}.scale", scale.numpy()))
    if graph.dtype != np.float32:
        graph.node("Cast", f"{name}.rounded", to=helper.np_dtype_to_tensor_dtype(graph.dtype))


def _write_ncrelu(graph: GraphWriter, name: str, x: str) -> None:
    zero = graph.weight(f"{name}.zero", 0.0)
    positive = graph.part("Relu", f"{name}.positive", x)
    graph.node("Concat", name, positive, graph.part("Min", f"{name}.negative", x, zero), axis=1)


def _write_affine(graph: GraphWriter, node: Node, x: str, shape: Shape) -> None:
    name, per_channel = node.name, (-1, *[1] * (len(shape) - 1))
    scale, shift = (node.tensors[key].numpy().reshape(per_channel) for key in ("scale", "shift"))
    if (scale == -1).all() and not shift.any():
        graph.node("Neg", name, x)
        return
    if not shift.any():
        graph.node("Mul", name, x, graph.weight(f"{name}.scale", scale))
        return
    if not (scale == 1).all():
        x = graph.part("Mul", f"{name}.scaled", x, graph.weight(f"{name}.scale", scale))
    graph.node("Add", name, x, graph.weight(f"{name}.shift", shift))


def _write_average_pool(graph: GraphWriter, node: Node, x: str, shape: Shape) -> None:
    padding, window = node.attributes["padding"], pool_window(node, shape)
    counts = node.attributes["count_padding"] and any(padding)
    if counts and window["pads"] != [*padding, *padding]:
        raise Refusal(
            f"{node.name}: ONNX has no average pool that rounds its size up and counts its padding; "
            "build it with ceil_mode=False or count_include_pad=False"
        )
    graph.node("AveragePool", node.name, x, **window, count_include_pad=int(counts))


def _write_activation(graph: GraphWriter, node: Node, x: str) -> None:
    name, how = node.name, node.attributes

    def number(key: str, value: float) -> str:
        return graph.weight(f"{name}.{key}", value)

    def part(op: str, key: str, *inputs: str) -> str:
        return graph.part(op, f"{name}.{key}", *inputs)

    match node.op:
        case "clip":
            graph.node("Clip", name, x, number("low", how["low"]), number("high", how["high"]))
        case "leaky_relu":
            graph.node("LeakyRelu", name, x, alpha=how["slope"])
        case "hardsigmoid":
            graph.node("HardSigmoid", name, x, alpha=1 / 6, beta=0.5)
        case "silu":
            graph.node("Mul", name, x, part("Sigmoid", "gate", x))
        case "gelu" if how["approximate"] == "none":  # x Φ(x) = x (1 + erf(x / √2)) / 2
            erf = part("Erf", "erf", part("Div", "scaled", x, number("root", sqrt(2))))
            share = part("Add", "share", erf, number("one", 1.0))
            graph.node("Mul", name, part("Mul", "product", x, share), number("half", 0.5))
        case "gelu":  # x (1 + tanh(√(2 / π) (x + 0.044715 x³))) / 2
            small = part("Mul", "small", part("Mul", "square", x, x), number("third", 0.044715))
            inner = part("Mul", "inner", x, part("Add", "factor", small, number("one", 1.0)))
            tanh = part("Tanh", "tanh", part("Mul", "scaled", inner, number("root", sqrt(2 / pi))))
            share = part("Add", "share", tanh, number("one.too", 1.0))
            graph.node("Mul", name, part("Mul", "product", x, share), number("half", 0.5))
        case _:
            raise TypeError(f"{name}: {node.op} has no ONNX form here")


def _pads(pairs: list[list[int]]) -> list[int]:
    """All beginnings, then all ends."""
    return [pair[end] for end in (0, 1) for pair in pairs]
