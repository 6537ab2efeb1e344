"""Eight-bit graphs for ONNX Runtime on CPUs: unsigned activations, signed weights, pixels' channels last.

Between the stem and the last pool every tensor is uint8 and every node an integer one. ReLU is then a
maximum with the zero point, NCReLU a maximum, a minimum and a concatenation, and none of them rounds.
ONNX Runtime would make these nodes of a Q/DQ graph itself, but around δ's additions it leaves two
transpositions per layer, and a fifth of the speed.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from torch import nn

from common.refusal import Refusal
from common.spec import Spec
from export.eight_bits.calibrate import Range, Ranges
from export.graphs.graph import GraphWriter, finish, window, write_layer
from export.runtimes.saturation import largest_pair
from fold.lower import Repeat, SharedReLU
from fold.plain import named_layers
from train.layers import NCReLU, Residual

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
Layers = list[tuple[str, nn.Module]]


@dataclass(frozen=True)
class EightBitTensor:
    """A uint8 tensor [N, H, W, C] in the graph; its values are scale (q - zero)."""

    name: str
    scale: float
    zero: int
    parameters: tuple[str, str]  # the names of scale and zero point in the graph


def to_integer_onnx(net: nn.Sequential, spec: Spec, provenance: Mapping[str, Any], ranges: Ranges) -> onnx.ModelProto:
    """images uint8 [N, H, W, C] → logits float32 [N, K], in eight bits from the second convolution on.

    `net` is a plain net lowered to concat, shared, shared-split or skip; `ranges` are those of the
    tensors of its float graph. The stem, which reads pixels, and the classifier stay in float32.
    """
    graph, layers = GraphWriter(), list(named_layers(deepcopy(net).float()))
    start, end = _eight_bit_part(layers)
    for name, layer in layers[:start]:
        write_layer(graph, name, layer)
    before = graph.tensor
    channels_last = graph.node("Transpose", f"{before}.channels-last", perm=[0, 2, 3, 1])
    x = _declare(graph, before, ranges[before])
    x = replace(x, name=graph.node("QuantizeLinear", f"{before}.quantized", channels_last, *x.parameters))
    x = _write_all(graph, layers[start:end], x, ranges)
    graph.node("DequantizeLinear", f"{x.name}.dequantized", x.name, *x.parameters)
    graph.node("Transpose", f"{x.name}.channels-first", perm=[0, 3, 1, 2])
    for name, layer in layers[end:]:
        write_layer(graph, name, layer)
    return finish(graph, spec, provenance)


def _eight_bit_part(layers: Layers) -> tuple[int, int]:
    """Where it starts and ends: after the stem with its ReLU and pool, and before the last pool."""
    kinds = [layer for _, layer in layers]
    start = next(index for index, layer in enumerate(kinds) if isinstance(layer, nn.Conv2d)) + 1
    while isinstance(kinds[start], (nn.ReLU, nn.MaxPool2d)):
        start += 1
    return start, next(index for index, layer in enumerate(kinds) if isinstance(layer, nn.AdaptiveAvgPool2d))


def _write_all(graph: GraphWriter, layers: Layers, x: EightBitTensor, ranges: Ranges) -> EightBitTensor:
    for index, (name, layer) in enumerate(layers):
        after = next((kind for _, kind in layers[index + 1 :] if not isinstance(kind, nn.MaxPool2d)), None)
        low, high = ranges[name] if isinstance(layer, (nn.Conv2d, Residual)) else (0.0, 0.0)
        # The range leaves out values that a ReLU then removes, through a pool or not.
        reach = (0.0, max(0.0, high)) if isinstance(after, nn.ReLU) else (low, high)
        x = _write(graph, name, layer, x, ranges, reach)
    return x


def _write(
    graph: GraphWriter, name: str, layer: nn.Module, x: EightBitTensor, ranges: Ranges, reach: Range
) -> EightBitTensor:
    """The nodes of one layer; `reach` is the range of its output."""
    match layer:
        case nn.ReLU():
            return x if x.zero == 0 else replace(x, name=graph.node("Max", name, x.name, x.parameters[1]))
        case NCReLU():
            parts = [graph.node(op, f"{name}.{op.lower()}", x.name, x.parameters[1]) for op in ("Max", "Min")]
            return replace(x, name=graph.node("Concat", name, *parts, axis=3))
        case SharedReLU():
            positive = graph.node("Max", f"{name}.max", x.name, x.parameters[1])
            return replace(x, name=graph.node("Concat", name, positive, x.name, axis=3))
        case Repeat():
            return replace(x, name=graph.node("Concat", name, x.name, x.name, axis=3))
        case nn.MaxPool2d():
            return replace(x, name=graph.node("NhwcMaxPool", name, x.name, domain=CONTRIB, **window(layer)))
        case nn.Conv2d():
            return _write_convolution(graph, name, layer, x, reach)
        case Residual():
            ends = [
                _write_all(graph, list(named_layers(branch, f"{name}.{kind}.")), x, ranges)
                for kind, branch in (("body", layer.body), ("shortcut", layer.shortcut))
            ]
            total = _declare(graph, name, reach)
            inputs = [part for end in ends for part in (end.name, *end.parameters)]
            graph.node("QLinearAdd", name, *inputs, *total.parameters, domain=CONTRIB)
            return total
    raise Refusal(f"{name}: {type(layer).__name__} has no eight-bit form; export int8 as concat, shared or skip")


def _write_convolution(
    graph: GraphWriter, name: str, conv: nn.Conv2d, x: EightBitTensor, reach: Range
) -> EightBitTensor:
    """Weights int8 with a scale for every filter, bias int32 in units of the products."""
    weight, scales = quantize_filters(conv.weight.detach().numpy())
    bias = np.zeros(len(weight)) if conv.bias is None else conv.bias.detach().numpy().astype(np.float64)
    bias = np.clip(np.rint(bias / (x.scale * scales.astype(np.float64))), -(2**30), 2**30)
    output = _declare(graph, name, reach)
    zeros = np.zeros(len(weight), np.int8)
    constants = {"weight": weight, "weight.scale": scales, "weight.zero": zeros, "bias": bias.astype(np.int32)}
    *filters, bias = (graph.constant(f"{name}.{key}", value) for key, value in constants.items())
    inputs = x.name, *x.parameters, *filters, *output.parameters, bias
    graph.node("QLinearConv", name, *inputs, domain=CONTRIB, channels_last=1, **window(conv))
    return output


def quantize_filters(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N_o, ...] → int8 from -127 to 127, and scales float32 [N_o]: symmetric, one for each filter.

    No two weights of a filter add up beyond ±128, so that no processor's sum of two products with unsigned bytes
    leaves 16 bits: 255 · 128 = 32,640. Those without VNNI saturate there. A filter whose weights would is given a
    larger scale: the two largest add up to 127 steps, and rounding both adds one at most. Filters so small that their
    scale is not a normal float32 are zeros.
    """
    filters = weight.reshape(len(weight), -1).astype(np.float64)
    largest = np.abs(filters).max(axis=1)
    scales = np.maximum(largest, largest_pair(filters)) / 127
    scales = np.where(scales >= np.finfo(np.float32).tiny, scales, 1.0).astype(np.float32)
    per_filter = scales.reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(weight / per_filter), -127, 127).astype(np.int8), scales


def _declare(graph: GraphWriter, name: str, reach: Range) -> EightBitTensor:
    """The tensor `name` for values in `reach`; its scale and zero point are written, its node is not."""
    scale, zero = levels_of(reach)
    scale_name = graph.constant(f"{name}.scale", np.asarray(scale))
    zero_name = graph.constant(f"{name}.zero", np.asarray(zero, np.uint8))
    return EightBitTensor(name, float(scale), zero, (scale_name, zero_name))


def levels_of(reach: Range) -> tuple[np.float32, int]:
    """Scale and zero point for values in `reach`: 0 is one of the 256 levels."""
    low, high = min(reach[0], 0.0), max(reach[1], 0.0)
    scale = np.float32((high - low) / 255) if high > low else np.float32(1.0)
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))
