"""Eight-bit graphs for ONNX Runtime on CPUs: unsigned activations, signed weights, pixels' channels last.

Between the stem and the last pool every tensor is uint8 and every node an integer one. ReLU is then a maximum with the
zero point, NCReLU a maximum, a minimum and a concatenation, and none of them rounds. ONNX Runtime would make these
nodes of a Q/DQ graph itself, but around δ's additions it leaves two transpositions per layer, and a fifth of the speed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch

from common.refusal import Refusal
from common.spec import Spec
from export.eight_bits.calibrate import Range, Ranges
from export.graphs.graph import GraphWriter, conv_window, finish, pool_window, write_nodes
from export.runtimes.saturation import largest_pair
from fold.graph import GraphNet
from fold.nodes import Graph, Node

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
LARGEST_BIAS = 2**30  # of the int32 that it is held in, which the sums of products share


@dataclass(frozen=True)
class EightBitTensor:
    """A uint8 tensor [N, H, W, C] in the graph; its values are scale (q - zero)."""

    name: str
    scale: float
    zero: int
    parameters: tuple[str, str]  # the names of scale and zero point in the graph


def to_integer_onnx(net: GraphNet, spec: Spec, provenance: Mapping[str, Any], ranges: Ranges) -> onnx.ModelProto:
    """images uint8 [N, H, W, C] → logits float32 [N, K], in eight bits between the stem and the last pool.

    `net` is a chain (`is_chain` in fold/lower.py) lowered to concat, shared, shared-split or skip; `ranges` are those
    of the tensors of its float graph. The stem, which reads pixels, and the classifier stay in float32.
    """
    plain = net.graph.convert(torch.float32)
    graph = GraphWriter(plain, spec.image)
    part = eight_bit_part(plain)
    write_nodes(graph, plain.nodes[1 : part.start])
    before = graph.tensor
    channels_last = graph.node("Transpose", f"{before}.channels-last", perm=[0, 2, 3, 1])
    x = _declare(graph, before, ranges[before])
    x = replace(x, name=graph.node("QuantizeLinear", f"{before}.quantized", channels_last, *x.parameters))
    tensors = {before: x}
    for node in plain.nodes[part.start : part.stop]:
        tensors[node.name] = _write(graph, plain, node, [tensors[name] for name in node.inputs], ranges)
    (last,) = plain.nodes[part.stop].inputs
    x = tensors[last]
    graph.node("DequantizeLinear", f"{x.name}.dequantized", x.name, *x.parameters)
    graph.outputs[last] = graph.node("Transpose", f"{x.name}.channels-first", perm=[0, 3, 1, 2])
    write_nodes(graph, plain.nodes[part.stop :])
    return finish(graph, spec, provenance)


def eight_bit_part(plain: Graph) -> range:
    """The nodes in eight bits: after the stem with its ReLU and pool, and before the next pool of whole images.

    The stem ends where one tensor alone is left to be read: branches and lowerings write its convolution as several.
    Empty if these nodes hold no convolution, or more than one tensor is left before the pool.
    """
    ops, is_alone = [node.op for node in plain.nodes], [node.name in plain.trunk for node in plain.nodes]
    start = is_alone.index(True, ops.index("conv")) + 1 if "conv" in ops else len(ops)
    while "global_pool" in ops[start:] and is_alone[start] and ops[start] in ("relu", "max_pool"):
        start += 1
    end = ops.index("global_pool", start) if "global_pool" in ops[start:] else start
    return range(start, end) if "conv" in ops[start:end] and is_alone[end - 1] else range(0)


def _write(
    graph: GraphWriter, plain: Graph, node: Node, inputs: Sequence[EightBitTensor], ranges: Ranges
) -> EightBitTensor:
    """The nodes of one operation."""
    name, x = node.name, inputs[0]
    match node.op:
        case "relu":
            return x if x.zero == 0 else replace(x, name=graph.node("Max", name, x.name, x.parameters[1]))
        case "ncrelu":
            parts = [graph.node(op, f"{name}.{op.lower()}", x.name, x.parameters[1]) for op in ("Max", "Min")]
            return replace(x, name=graph.node("Concat", name, *parts, axis=3))
        case "cat":  # of a tensor and its ReLU, or itself: their scales and zero points are the same
            return replace(x, name=graph.node("Concat", name, *(part.name for part in inputs), axis=3))
        case "max_pool":
            window = pool_window(node, graph.shapes[node.inputs[0]])
            return replace(x, name=graph.node("NhwcMaxPool", name, x.name, domain=CONTRIB, **window))
        case "conv":
            return _write_convolution(graph, node, x, _reach(plain, name, ranges))
        case "add":
            total = _declare(graph, name, _reach(plain, name, ranges))
            operands = [part for term in inputs for part in (term.name, *term.parameters)]
            graph.node("QLinearAdd", name, *operands, *total.parameters, domain=CONTRIB)
            return total
        case _:
            raise Refusal(f"{name}: {node.op} has no eight-bit form; export int8 as concat, shared or skip")


def _reach(plain: Graph, name: str, ranges: Ranges) -> Range:
    """The range of a node's output without the values that a ReLU then removes, through a pool or not."""
    low, high = ranges[name]
    return (0.0, max(0.0, high)) if _is_rectified(plain, name) else (low, high)


def _is_rectified(plain: Graph, name: str) -> bool:
    return all(
        reader.op == "relu" or (reader.op == "max_pool" and _is_rectified(plain, reader.name))
        for reader in plain.readers(name)
    )


def _write_convolution(graph: GraphWriter, node: Node, x: EightBitTensor, reach: Range) -> EightBitTensor:
    """Weights int8 with a scale for every filter, bias int32 in units of the products."""
    bias = node.tensors["bias"].numpy().astype(np.float64) if "bias" in node.tensors else np.zeros(1)
    weight, scales = quantize_filters(node.tensors["weight"].numpy(), bias / x.scale)
    bias = np.rint(bias / (x.scale * scales.astype(np.float64)))
    output = _declare(graph, node.name, reach)
    zeros = np.zeros(len(weight), np.int8)
    constants = {"weight": weight, "weight.scale": scales, "weight.zero": zeros, "bias": bias.astype(np.int32)}
    *filters, bias = (graph.constant(f"{node.name}.{key}", value) for key, value in constants.items())
    inputs = x.name, *x.parameters, *filters, *output.parameters, bias
    graph.node("QLinearConv", node.name, *inputs, domain=CONTRIB, channels_last=1, **conv_window(node))
    return output


def quantize_filters(weight: np.ndarray, bias: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """[N_o, ...] → int8 from -127 to 127, and scales float32 [N_o]: symmetric, one for each filter.

    No two weights of a filter add up beyond ±128, so that no processor's sum of two products with unsigned bytes
    leaves 16 bits: 255 · 128 = 32,640. Those without VNNI saturate there. A filter whose weights would is given a
    larger scale: the two largest add up to 127 steps, and rounding both adds one at most. `bias`: see `usable`.
    """
    filters = weight.reshape(len(weight), -1).astype(np.float64)
    scales = usable(np.maximum(np.abs(filters).max(axis=1), largest_pair(filters)) / 127, bias)
    per_filter = scales.reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(weight / per_filter), -127, 127).astype(np.int8), scales


def usable(scales: np.ndarray, bias: np.ndarray | float) -> np.ndarray:
    """float32 [N_o]: the scales of filters, larger for those that are next to nothing, as of faded channels.

    `bias` [N_o] is in units of the activations' scale; in units of the products it is LARGEST_BIAS at most. Filters so
    small that their scale is not a normal float32 are zeros.
    """
    scales = np.maximum(scales, np.abs(bias) / LARGEST_BIAS)
    return np.where(scales >= np.finfo(np.float32).tiny, scales, 1.0).astype(np.float32)


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
