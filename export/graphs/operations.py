"""From a plain graph to ONNX: one case per operation, nodes named like the graph's."""

from math import pi, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import TensorProto, helper

from common.refusal import Refusal
from common.spec import ImageSpec
from fold.nodes import Graph as PlainGraph
from fold.nodes import Node
from fold.shapes import Shape, infer_shapes, pooled

if TYPE_CHECKING:
    from export.graphs.graph import Graph

SAME_NAME = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "hardswish": "HardSwish",
    "mul": "Mul",
    "global_pool": "GlobalAveragePool",
}
END = np.iinfo(np.int64).max  # of a slice without one


def write_graph(graph: "Graph", plain: PlainGraph, image: ImageSpec) -> None:
    """All nodes of a plain graph, its output last."""
    graph.taken = {node.name for node in plain.nodes}
    shapes = infer_shapes(plain, (image.height, image.width, image.channels))
    tensors: dict[str, str] = {plain.nodes[0].name: graph.tensor}
    for node in plain.convert(torch.float32).nodes[1:]:
        write_node(graph, node, [tensors[name] for name in node.inputs], [shapes[name] for name in node.inputs])
        tensors[node.name] = graph.tensor


def write_normalize(graph: "Graph", name: str, offset: np.ndarray, scale: np.ndarray) -> None:
    """Pixels → x, in float32 whatever the precision: the rounding of a pixel would be the largest of all."""
    # TensorRT lets only Cast read uint8, so the transposition comes after it.
    graph.node("Cast", f"{name}.cast", to=TensorProto.FLOAT)
    graph.node("Transpose", f"{name}.transpose", perm=[0, 3, 1, 2])
    graph.node("Sub", f"{name}.sub", graph.tensor, graph.constant(f"{name}.offset", offset))
    graph.node("Mul", name, graph.tensor, graph.constant(f"{name}.scale", scale))
    if graph.dtype != np.float32:
        graph.node("Cast", f"{name}.rounded", to=helper.np_dtype_to_tensor_dtype(graph.dtype))


def write_node(graph: "Graph", node: Node, inputs: list[str], shapes: list[Shape]) -> None:
    """The ONNX nodes of one operation; `shapes` are those of its inputs for one image."""
    name, x, how = node.name, inputs[0], node.attributes
    match node.op:
        case "normalize":
            write_normalize(graph, name, *(node.tensors[key].numpy() for key in ("offset", "scale")))
        case "conv":
            weights = [graph.weight(graph.free(f"{name}.{key}"), node.tensors[key]) for key in ("weight", "bias")]
            window = {"strides": how["stride"], "dilations": how["dilation"], "group": how["groups"]}
            kernel = list(node.tensors["weight"].shape[2:])
            graph.node("Conv", name, x, *weights, kernel_shape=kernel, pads=_pads(how["padding"]), **window)
        case "linear":
            _write_linear(graph, node, x, shapes[0])
        case "affine":
            _write_affine(graph, node, x, shapes[0])
        case "add":
            _write_sum(graph, name, inputs)
        case "cat":
            graph.node("Concat", name, *inputs, axis=1)
        case "slice":
            ends = (how["start"], END if how["stop"] is None else how["stop"], 1)
            numbers = [
                graph.numbers(f"{name}.{key}", [end]) for key, end in zip(("start", "stop", "axis"), ends, strict=True)
            ]
            graph.node("Slice", name, x, *numbers)
        case "pad":
            pairs = [[0, 0], [0, 0], *how["padding"]]
            graph.node("Pad", name, x, graph.numbers(f"{name}.pads", _pads(pairs)))
        case "ncrelu":
            zero = graph.weight(graph.free(f"{name}.zero"), np.zeros(()))
            positive = graph.node("Relu", graph.free(f"{name}.positive"), x)
            negative = graph.node("Min", graph.free(f"{name}.negative"), x, zero)
            graph.node("Concat", name, positive, negative, axis=1)
        case "max_pool" | "avg_pool":
            _write_pool(graph, node, x, shapes[0])
        case "flatten":
            graph.node("Flatten", name, x, axis=1)
        case _ if node.op in SAME_NAME:
            graph.node(SAME_NAME[node.op], name, *inputs)
        case _:
            _write_activation(graph, node, x)


def _pads(pairs: list[list[int]]) -> list[int]:
    """All beginnings, then all ends."""
    return [pair[end] for end in (0, 1) for pair in pairs]


def _write_linear(graph: "Graph", node: Node, x: str, shape: Shape) -> None:
    weight, bias = (node.tensors[key].numpy() for key in ("weight", "bias"))
    if len(shape) == 1:
        names = [
            graph.weight(graph.free(f"{node.name}.{key}"), value) for key, value in (("weight", weight), ("bias", bias))
        ]
        graph.node("Gemm", node.name, x, *names, transB=1)
        return
    matrix = graph.weight(graph.free(f"{node.name}.weight"), weight.T)
    product = graph.node("MatMul", graph.free(f"{node.name}.product"), x, matrix)
    graph.node("Add", node.name, product, graph.weight(graph.free(f"{node.name}.bias"), bias))


def _write_affine(graph: "Graph", node: Node, x: str, shape: Shape) -> None:
    per_channel = (-1, *[1] * (len(shape) - 1))
    scale, shift = (node.tensors[key].numpy().reshape(per_channel) for key in ("scale", "shift"))
    if not shift.any():
        graph.node("Mul", node.name, x, graph.weight(graph.free(f"{node.name}.scale"), scale))
        return
    if not (scale == 1).all():
        x = graph.node(
            "Mul", graph.free(f"{node.name}.scaled"), x, graph.weight(graph.free(f"{node.name}.scale"), scale)
        )
    graph.node("Add", node.name, x, graph.weight(graph.free(f"{node.name}.shift"), shift))


def _write_sum(graph: "Graph", name: str, inputs: list[str]) -> None:
    """Two at a time: runtimes fuse such a sum into a convolution."""
    total = inputs[0]
    for index, term in enumerate(inputs[1:], start=2):
        is_last = index == len(inputs)
        total = graph.node("Add", name if is_last else graph.free(f"{name}.first{index}"), total, term)


def _write_pool(graph: "Graph", node: Node, x: str, shape: Shape) -> None:
    """Where the last window reaches beyond the padding, ONNX is given padding that reaches as far.

    Padding takes no part in a maximum, nor in a mean that does not count it.
    """
    how = node.attributes
    dilation = how.get("dilation", [1] * len(how["size"]))
    pairs: list[list[int]] = []
    windows = zip(shape[1:], how["size"], how["stride"], how["padding"], dilation, strict=True)
    for size, taps, stride, padding, gap in windows:
        num = pooled(size, taps, stride, padding, gap, ceil=how["ceil"])
        reach = (num - 1) * stride + gap * (taps - 1) + 1
        pairs.append([padding, max(padding, reach - size - padding)])
    window: dict[str, Any] = {"kernel_shape": how["size"], "strides": how["stride"], "pads": _pads(pairs)}
    if node.op == "max_pool":
        graph.node("MaxPool", node.name, x, **window, dilations=dilation)
        return
    is_longer = any(before != after for before, after in pairs)
    counts = how["count_padding"] and any(how["padding"])
    if is_longer and counts:
        raise Refusal(
            f"{node.name}: ONNX has no average pool that rounds its size up and counts its padding; "
            "build it with ceil_mode=False or count_include_pad=False"
        )
    graph.node("AveragePool", node.name, x, **window, count_include_pad=int(counts))


def _write_activation(graph: "Graph", node: Node, x: str) -> None:
    name, how = node.name, node.attributes

    def number(key: str, value: float) -> str:
        return graph.weight(graph.free(f"{name}.{key}"), np.asarray(value))

    match node.op:
        case "clip":
            graph.node("Clip", name, x, number("low", how["low"]), number("high", how["high"]))
        case "leaky_relu":
            graph.node("LeakyRelu", name, x, alpha=how["slope"])
        case "hardsigmoid":
            graph.node("HardSigmoid", name, x, alpha=1 / 6, beta=0.5)
        case "silu":
            graph.node("Mul", name, x, graph.node("Sigmoid", graph.free(f"{name}.gate"), x))
        case "gelu" if how["approximate"] == "none":  # x Φ(x) = x (1 + erf(x / √2)) / 2
            scaled = graph.node("Div", graph.free(f"{name}.scaled"), x, number("root", sqrt(2)))
            erf = graph.node("Erf", graph.free(f"{name}.erf"), scaled)
            share = graph.node("Add", graph.free(f"{name}.share"), erf, number("one", 1.0))
            product = graph.node("Mul", graph.free(f"{name}.product"), x, share)
            graph.node("Mul", name, product, number("half", 0.5))
        case "gelu":  # x (1 + tanh(√(2 / π) (x + 0.044715 x³))) / 2
            square = graph.node("Mul", graph.free(f"{name}.square"), x, x)
            small = graph.node("Mul", graph.free(f"{name}.small"), square, number("third", 0.044715))
            factor = graph.node("Add", graph.free(f"{name}.factor"), small, number("one", 1.0))
            inner = graph.node("Mul", graph.free(f"{name}.inner"), x, factor)
            scaled = graph.node("Mul", graph.free(f"{name}.scaled"), inner, number("root", sqrt(2 / pi)))
            tanh = graph.node("Tanh", graph.free(f"{name}.tanh"), scaled)
            share = graph.node("Add", graph.free(f"{name}.share"), tanh, number("one.too", 1.0))
            product = graph.node("Mul", graph.free(f"{name}.product"), x, share)
            graph.node("Mul", name, product, number("half", 0.5))
        case _:
            raise TypeError(f"{name}: {node.op} has no ONNX form here")
