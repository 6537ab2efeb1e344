"""From a plain net to ONNX: one case per layer, nodes named like the layers. Graphs: export/graphs/operations.py."""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from common.refusal import Refusal
from common.spec import Spec
from export.graphs.operations import write_graph, write_normalize
from fold.graph import GraphNet
from fold.layers import Convolution
from fold.lower import Mirror, Negate, Repeat, SharedReLU
from fold.plain import PlainNet, named_layers
from train.layers import NCReLU, Normalize, Residual

OPSET = 19  # the first with float8 types; ONNX Runtime and TensorRT 10 take it
IR_VERSION = 9
FLOATS = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


class Graph:
    """Nodes and weights under construction. `tensor` is the output of the layer written last."""

    def __init__(self, dtype: np.dtype = FLOATS["fp32"]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.tensor = "images"
        self.dtype = dtype  # of the weights of layers
        self.taken: set[str] = set()  # names that `free` does not give

    def weight(self, name: str, value: Tensor | np.ndarray) -> str:
        """A layer's weights, in the graph's precision; refuses those that it cannot hold."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        largest = float(np.abs(array).max(initial=0))
        if not largest <= float(np.finfo(self.dtype).max):
            raise Refusal(f"{name} holds {largest:.3g}, beyond {self.dtype}; export with --precision fp32")
        return self.constant(name, array.astype(self.dtype))

    def constant(self, name: str, array: np.ndarray) -> str:
        """Numbers of exactly this type."""
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def free(self, name: str) -> str:
        """`name`, or one like it that no node has: of what stands between two nodes of a net."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def numbers(self, name: str, values: list[int]) -> str:
        """Whole numbers that a node reads as its settings."""
        return self.constant(self.free(name), np.asarray(values, np.int64))

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Append a node that reads `inputs` (default: the layer before) and is named like its output."""
        self.nodes.append(helper.make_node(op, list(inputs or (self.tensor,)), [name], name=name, **attributes))
        self.tensor = name
        return name


def to_onnx(net: PlainNet, spec: Spec, provenance: Mapping[str, Any], *, precision: str = "fp32") -> onnx.ModelProto:
    """images uint8 [N, H, W, C] → logits float32 [N, K], checked, with spec and provenance as metadata.

    `net` is a plain net (fold/plain.py), of layers or a graph, in any lowering (fold/lower.py); a layer that is
    none of their kinds raises TypeError. `precision` is fp32 or fp16: of everything between normalisation and logits.
    """
    graph = Graph(FLOATS[precision])
    if isinstance(net, GraphNet):
        write_graph(graph, net.with_tensors(), spec.image)
        return finish(graph, spec, provenance)
    for name, layer in named_layers(deepcopy(net).float()):
        write_layer(graph, name, layer)
    return finish(graph, spec, provenance)


def finish(graph: Graph, spec: Spec, provenance: Mapping[str, Any]) -> onnx.ModelProto:
    """The model of a graph whose last node gives the logits."""
    image = spec.image
    if graph.dtype != np.float32:
        graph.node("Cast", "logits", to=TensorProto.FLOAT)
    graph.nodes[-1].output[0] = "logits"
    shape = ["N", image.height, image.width, image.channels]
    domains = sorted({node.domain for node in graph.nodes} - {""})
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            spec.name,
            [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(spec.labels)])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)],
        ir_version=IR_VERSION,
        producer_name="diracnet-road",
    )
    helper.set_model_props(model, {"spec": spec.to_json(), "provenance": json.dumps(provenance)})
    onnx.checker.check_model(model, full_check=True)
    return model


def set_provenance(model: onnx.ModelProto, provenance: Mapping[str, Any]) -> None:
    """Put `provenance` into the metadata in place of what is there."""
    entry = next(entry for entry in model.metadata_props if entry.key == "provenance")
    entry.value = json.dumps(provenance)


def write_layer(graph: Graph, name: str, layer: nn.Module) -> None:
    """The nodes of one layer."""
    match layer:
        case Normalize():
            write_normalize(graph, name, layer.offset.numpy(), layer.scale.numpy())
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            parts = {"weight": layer.weight, "bias": layer.bias}
            weights = [graph.weight(f"{name}.{key}", value) for key, value in parts.items() if value is not None]
            graph.node("Conv", name, graph.tensor, *weights, **window(layer))
        case NCReLU():
            x, zero = graph.tensor, graph.weight(f"{name}.zero", np.zeros(()))
            positive = graph.node("Relu", f"{name}.positive", x)
            negative = graph.node("Min", f"{name}.negative", x, zero)
            graph.node("Concat", name, positive, negative, axis=1)
        case SharedReLU():
            x = graph.tensor
            graph.node("Concat", name, graph.node("Relu", f"{name}.positive", x), x, axis=1)
        case Mirror():
            x = graph.tensor
            graph.node("Concat", name, x, graph.node("Neg", f"{name}.negative", x), axis=1)
        case Negate():
            graph.node("Neg", name)
        case Repeat():
            graph.node("Concat", name, graph.tensor, graph.tensor, axis=1)
        case nn.ReLU():
            graph.node("Relu", name)
        case nn.MaxPool2d():
            graph.node("MaxPool", name, **window(layer))
        case Residual():
            x, ends = graph.tensor, []
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
            weights = (graph.weight(f"{name}.weight", layer.weight), graph.weight(f"{name}.bias", layer.bias))
            graph.node("Gemm", name, graph.tensor, *weights, transB=1)
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
