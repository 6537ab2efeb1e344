"""From a plain net to ONNX: one case per layer of a chain, one per operation of a graph; nodes keep their names."""

import json
from collections.abc import Mapping
from copy import deepcopy
from math import pi, sqrt
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from common.refusal import Refusal
from common.spec import ImageSpec, Spec
from fold.graph import GraphNet
from fold.lower import Mirror, Negate, Repeat, SharedReLU
from fold.nodes import Graph, Node
from fold.plain import Convolution, PlainNet, named_layers
from fold.shapes import Shape, infer_shapes, pooled
from train.layers import NCReLU, Normalize, Residual

OPSET = 19  # the first with float8 types; ONNX Runtime and TensorRT 10 take it
IR_VERSION = 9
FLOATS = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
_SAME_NAME = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish", "mul": "Mul"}
_END = np.iinfo(np.int64).max  # of a slice without one


class GraphWriter:
    """Nodes and weights under construction. `tensor` is the output of the node written last."""

    def __init__(self, dtype: np.dtype = FLOATS["fp32"]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.tensor = "images"
        self.dtype = dtype  # of the weights of layers
        self.taken: set[str] = set()  # names that `free` does not give

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

    def weights(self, name: str, weight: Tensor, bias: Tensor | None) -> list[str]:
        parts = {"weight": weight, "bias": bias}
        return [self.weight(f"{name}.{key}", value) for key, value in parts.items() if value is not None]

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


def to_onnx(net: PlainNet, spec: Spec, provenance: Mapping[str, Any], *, precision: str = "fp32") -> onnx.ModelProto:
    """images uint8 [N, H, W, C] → logits float32 [N, K], checked, with spec and provenance as metadata.

    `net` is a plain net (fold/plain.py), of layers or a graph, in any lowering (fold/lower.py); a layer that is
    none of their kinds raises TypeError. `precision` is fp32 or fp16: of everything between normalisation and logits.
    """
    graph = GraphWriter(FLOATS[precision])
    if isinstance(net, GraphNet):
        _write_graph(graph, net.with_tensors(), spec.image)
    else:
        for name, layer in named_layers(deepcopy(net).float()):
            write_layer(graph, name, layer)
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


def write_layer(graph: GraphWriter, name: str, layer: nn.Module) -> None:
    """The nodes of one layer of a chain."""
    x = graph.tensor
    match layer:
        case Normalize():
            _write_normalize(graph, name, layer.offset, layer.scale)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            graph.node("Conv", name, x, *graph.weights(name, layer.weight, layer.bias), **window(layer))
        case NCReLU():
            _write_ncrelu(graph, name, x)
        case SharedReLU():
            graph.node("Concat", name, graph.node("Relu", f"{name}.positive", x), x, axis=1)
        case Mirror():
            graph.node("Concat", name, x, graph.node("Neg", f"{name}.negative", x), axis=1)
        case Negate():
            graph.node("Neg", name)
        case Repeat():
            graph.node("Concat", name, x, x, axis=1)
        case nn.ReLU():
            graph.node("Relu", name)
        case nn.MaxPool2d():
            graph.node("MaxPool", name, **window(layer))
        case Residual():
            ends = []
            for branch in ("body", "shortcut"):
                graph.tensor = x
                for part, inner in named_layers(getattr(layer, branch), f"{name}.{branch}."):
                    write_layer(graph, part, inner)
                ends.append(graph.tensor)
            graph.node("Add", name, *ends)
        case nn.AdaptiveAvgPool2d(output_size=1):
            graph.node("GlobalAveragePool", name)
        case nn.Flatten():
            graph.node("Flatten", name)
        case nn.Linear():
            graph.node("Gemm", name, x, *graph.weights(name, layer.weight, layer.bias), transB=1)
        case _:
            raise TypeError(f"{name}: {type(layer).__name__} has no ONNX form here")


def window(layer: Convolution | nn.MaxPool2d) -> dict[str, Any]:
    """ONNX's attributes of a convolution's or a max-pool's window."""
    if isinstance(layer, nn.MaxPool2d):
        size, stride, pad = layer.kernel_size, layer.stride, layer.padding
        return {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
    return {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "pads": [*layer.padding, *layer.padding],
        "dilations": layer.dilation,
        "group": layer.groups,
    }


def _write_graph(graph: GraphWriter, plain: Graph, image: ImageSpec) -> None:
    graph.taken = {node.name for node in plain.nodes}
    shapes = infer_shapes(plain, image.shape)
    tensors: dict[str, str] = {plain.nodes[0].name: graph.tensor}
    for node in plain.convert(torch.float32).nodes[1:]:
        _write_node(graph, node, [tensors[name] for name in node.inputs], [shapes[name] for name in node.inputs])
        tensors[node.name] = graph.tensor


def _write_node(graph: GraphWriter, node: Node, inputs: list[str], shapes: list[Shape]) -> None:
    """The ONNX nodes of one operation; `shapes` are those of its inputs for one image."""
    name, x, how = node.name, inputs[0], node.attributes
    match node.op:
        case "normalize":
            _write_normalize(graph, name, node.tensors["offset"], node.tensors["scale"])
        case "conv":
            weights = graph.weights(name, node.tensors["weight"], node.tensors["bias"])
            window = {"strides": how["stride"], "dilations": how["dilation"], "group": how["groups"]}
            kernel = list(node.tensors["weight"].shape[2:])
            graph.node("Conv", name, x, *weights, kernel_shape=kernel, pads=_pads(how["padding"]), **window)
        case "linear" if len(shapes[0]) == 1:
            weights = graph.weights(name, node.tensors["weight"], node.tensors["bias"])
            graph.node("Gemm", name, x, *weights, transB=1)
        case "linear":
            weight = graph.weight(f"{name}.weight", node.tensors["weight"].T)
            product = graph.part("MatMul", f"{name}.product", x, weight)
            graph.node("Add", name, product, graph.weight(f"{name}.bias", node.tensors["bias"]))
        case "affine":
            _write_affine(graph, node, x, shapes[0])
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
        case "max_pool" | "avg_pool":
            _write_pool(graph, node, x, shapes[0])
        case "flatten":
            graph.node("Flatten", name, x, axis=1)
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
    if not shift.any():
        graph.node("Mul", name, x, graph.weight(f"{name}.scale", scale))
        return
    if not (scale == 1).all():
        x = graph.part("Mul", f"{name}.scaled", x, graph.weight(f"{name}.scale", scale))
    graph.node("Add", name, x, graph.weight(f"{name}.shift", shift))


def _write_pool(graph: GraphWriter, node: Node, x: str, shape: Shape) -> None:
    """Where the last window reaches beyond the padding, ONNX is given padding that reaches as far.

    Padding takes no part in a maximum, nor in a mean that does not count it.
    """
    how, pairs = node.attributes, []
    dilation = how.get("dilation", [1] * len(how["size"]))
    windows = zip(shape[1:], how["size"], how["stride"], how["padding"], dilation, strict=True)
    for size, taps, stride, padding, gap in windows:
        num = pooled(size, taps, stride, padding, gap, ceil=how["ceil"])
        reach = (num - 1) * stride + gap * (taps - 1) + 1
        pairs.append([padding, max(padding, reach - size - padding)])
    window: dict[str, Any] = {"kernel_shape": how["size"], "strides": how["stride"], "pads": _pads(pairs)}
    if node.op == "max_pool":
        graph.node("MaxPool", node.name, x, **window, dilations=dilation)
        return
    counts = how["count_padding"] and any(how["padding"])
    if counts and any(before != after for before, after in pairs):
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
