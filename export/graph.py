"""From a plain net to ONNX: one case per layer, nodes named like the layers."""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fold.plain import named_layers
from train.layers import NCReLU, Normalize, Residual
from train.spec import Spec

OPSET = 19  # the first with float8 types; ONNX Runtime and TensorRT 10 take it
IR_VERSION = 9


class Graph:
    """Nodes and weights under construction. `tensor` is the output of the layer written last."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.tensor = "images"

    def weight(self, name: str, value: Tensor | np.ndarray) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Append a node that reads `inputs` (default: the layer before) and is named like its output."""
        self.nodes.append(helper.make_node(op, list(inputs or (self.tensor,)), [name], name=name, **attributes))
        self.tensor = name
        return name


def to_onnx(net: nn.Sequential, spec: Spec, provenance: Mapping[str, Any]) -> onnx.ModelProto:
    """images uint8 [N, H, W, C] → logits float32 [N, K], checked, with spec and provenance as metadata.

    `net` is a plain net (fold/plain.py); a layer that is none of its kinds raises TypeError.
    """
    graph, image = Graph(), spec.image
    for name, layer in named_layers(deepcopy(net).float()):
        write_layer(graph, name, layer)
    graph.nodes[-1].output[0] = "logits"
    shape = ["N", image.height, image.width, image.channels]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            spec.name,
            [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(spec.labels)])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="diracnet-road",
    )
    helper.set_model_props(model, {"spec": spec.to_json(), "provenance": json.dumps(provenance)})
    onnx.checker.check_model(model, full_check=True)
    return model


def write_layer(graph: Graph, name: str, layer: nn.Module) -> None:
    """The nodes of one layer."""
    match layer:
        case Normalize():
            # TensorRT lets only Cast read uint8, so the transposition comes after it.
            graph.node("Cast", f"{name}.cast", to=TensorProto.FLOAT)
            graph.node("Transpose", f"{name}.transpose", perm=[0, 3, 1, 2])
            graph.node("Sub", f"{name}.sub", graph.tensor, graph.weight(f"{name}.offset", layer.offset))
            graph.node("Mul", name, graph.tensor, graph.weight(f"{name}.scale", layer.scale))
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            weights = (graph.weight(f"{name}.weight", layer.weight), graph.weight(f"{name}.bias", layer.bias))
            graph.node(
                "Conv",
                name,
                graph.tensor,
                *weights,
                kernel_shape=layer.kernel_size,
                strides=layer.stride,
                pads=[*layer.padding, *layer.padding],
                dilations=layer.dilation,
                group=layer.groups,
            )
        case NCReLU():
            x, zero = graph.tensor, graph.weight(f"{name}.zero", np.zeros((), np.float32))
            positive = graph.node("Relu", f"{name}.positive", x)
            negative = graph.node("Min", f"{name}.negative", x, zero)
            graph.node("Concat", name, positive, negative, axis=1)
        case nn.ReLU():
            graph.node("Relu", name)
        case nn.MaxPool2d():
            size, stride, pad = layer.kernel_size, layer.stride, layer.padding
            graph.node("MaxPool", name, kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pad] * 4)
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
