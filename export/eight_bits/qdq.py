"""Eight-bit graphs as QuantizeLinear and DequantizeLinear around what is to run in eight bits.

For TensorRT signed and symmetric throughout, since it has no zero points; a scale for every filter and one for
every activation. Biases stay float32: TensorRT's parser takes no int32 ones.

For ONNX Runtime's CPU kernels unsigned activations with zero points, filters whose sums cannot saturate, and int32
biases: what its optimiser makes QLinearConv of. export/eight_bits/integer.py writes faster graphs, of chains alone.
"""

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from common.refusal import Refusal
from export.eight_bits.calibrate import Range, Ranges
from export.eight_bits.integer import levels_of, quantize_filters

LARGEST = {"int8": 127.0, "fp8": float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)}
TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def to_qdq_onnx(
    model: onnx.ModelProto, ranges: Ranges, *, precision: str, for_onnxruntime: bool = False
) -> onnx.ModelProto:
    """A float32 graph of `to_onnx` with every convolution but the stem in int8 or fp8.

    Quantised are the filters, what the convolutions read, and what an addition reads that is no
    convolution's output, so that δ's identity moves eight bits too; for ONNX Runtime whatever reads a convolution.
    `ranges` are those of the tensors.
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    writer = (_UnsignedWriter if for_onnxruntime else _Writer)(graph.graph, ranges, precision)
    made_by = {node.output[0]: node for node in model.graph.node}
    stem = next((node.name for node in model.graph.node if node.op_type == "Conv"), "")
    if not any(node.op_type == "Conv" and node.name != stem for node in model.graph.node):
        raise Refusal("the net has no convolution but its first, which eight bits leave as it is; export it as fp32")
    nodes = []
    read = _read_by_integers if for_onnxruntime else _quantized_inputs
    for node in graph.graph.node:
        for index in read(node, stem, made_by):
            node.input[index] = writer.activation(node.input[index])
        if node.op_type == "Conv" and node.name != stem:
            node.input[1] = writer.filters(node.input[1])
            writer.bias(node)
        nodes += [*writer.take(), node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(writer.weights.values())
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _quantized_inputs(node: NodeProto, stem: str, made_by: dict[str, NodeProto]) -> list[int]:
    match node.op_type:
        case "Conv" if node.name != stem:
            return [0]
        case "Add" if all(name in made_by for name in node.input):  # of a branch, not of a constant
            return [index for index, name in enumerate(node.input) if made_by[name].op_type != "Conv"]
    return []


def _read_by_integers(node: NodeProto, stem: str, made_by: dict[str, NodeProto]) -> list[int]:
    """The inputs of a convolution, and inputs that are the output of one, with the ReLU that its kernel includes."""

    def is_of_integers(name: str) -> bool:
        maker = made_by.get(name)
        if maker and maker.op_type == "Relu":
            maker = made_by.get(maker.input[0])
        return maker is not None and maker.op_type == "Conv" and maker.name != stem

    if node.op_type == "Conv":
        return [0] if node.name != stem else []
    if node.op_type == "Relu":
        return []
    return [index for index, name in enumerate(node.input) if is_of_integers(name)]


class _Writer:
    """Q/DQ pairs under construction: one for each tensor, however many nodes read it."""

    def __init__(self, graph: onnx.GraphProto, ranges: Ranges, precision: str) -> None:
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self._ranges, self._precision = ranges, precision
        self._done: dict[str, str] = {}
        self._pending: list[NodeProto] = []

    def take(self) -> list[NodeProto]:
        """The nodes made since the last call."""
        taken, self._pending = self._pending, []
        return taken

    def activation(self, name: str) -> str:
        """The name of tensor `name` after a Q/DQ pair."""
        if name not in self._done:
            scale, zero = self._scale_and_zero(f"{name}.q", self._ranges[name])
            parameters = [self._constant(f"{name}.q.scale", scale), self._add(zero)]
            self._pending += [
                helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.q"], name=f"{name}.q"),
                helper.make_node("DequantizeLinear", [f"{name}.q", *parameters], [f"{name}.dq"], name=f"{name}.dq"),
            ]
            self._done[name] = f"{name}.dq"
        return self._done[name]

    def filters(self, name: str) -> str:
        """The name of the weight `name` [N_o, ...] after a dequantisation with a scale for every filter."""
        weight = numpy_helper.to_array(self.weights.pop(name))
        largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        scales = np.where(largest > 0, largest / LARGEST[self._precision], 1.0).astype(np.float32)
        levels = weight / scales.reshape(-1, *[1] * (weight.ndim - 1))
        zeros = _tensor(f"{name}.zero", np.zeros(scales.shape, np.float32), self._precision)
        return self._dequantized(_tensor(name, levels, self._precision), scales, zeros)

    def bias(self, node: NodeProto) -> None:
        """The bias of a convolution whose input and filters are quantised: it stays as it is."""

    def _scale_and_zero(self, name: str, reach: Range) -> tuple[np.ndarray, TensorProto]:
        largest = max(map(abs, reach)) or 1.0
        zero = _tensor(f"{name}.zero", np.zeros((), np.float32), self._precision)
        return np.asarray(largest / LARGEST[self._precision], np.float32), zero

    def _dequantized(self, levels: TensorProto, scales: np.ndarray, zeros: TensorProto) -> str:
        """The name of stored levels [N_o, ...] times their scales [N_o]."""
        name = levels.name
        inputs = [self._add(levels), self._constant(f"{name}.scale", scales), self._add(zeros)]
        self._pending.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], name=f"{name}.dq", axis=0))
        return f"{name}.dq"

    def _constant(self, name: str, array: np.ndarray) -> str:
        return self._add(numpy_helper.from_array(array, name))

    def _add(self, tensor: TensorProto) -> str:
        self.weights[tensor.name] = tensor
        return tensor.name


class _UnsignedWriter(_Writer):
    """The same with unsigned activations, zero points and int32 biases."""

    def filters(self, name: str) -> str:
        return self._dequantized_integers(name, *quantize_filters(numpy_helper.to_array(self.weights.pop(name))))

    def bias(self, node: NodeProto) -> None:
        if len(node.input) < 3:
            return
        name, x, w = node.input[2], node.input[0].removesuffix(".dq"), node.input[1].removesuffix(".dq")
        x_scale, w_scales, bias = (
            numpy_helper.to_array(self.weights[part]) for part in (f"{x}.q.scale", f"{w}.scale", name)
        )
        scales = (x_scale * w_scales).astype(np.float32)  # those of the sums that the bias is added to
        levels = np.clip(np.rint(bias.astype(np.float64) / scales), -(2**31), 2**31 - 1).astype(np.int32)
        del self.weights[name]
        node.input[2] = self._dequantized_integers(name, levels, scales)

    def _scale_and_zero(self, name: str, reach: Range) -> tuple[np.ndarray, TensorProto]:
        scale, zero = levels_of(reach)
        return np.asarray(scale, np.float32), numpy_helper.from_array(np.asarray(zero, np.uint8), f"{name}.zero")

    def _dequantized_integers(self, name: str, levels: np.ndarray, scales: np.ndarray) -> str:
        zeros = numpy_helper.from_array(np.zeros(scales.shape, levels.dtype), f"{name}.zero")
        return self._dequantized(numpy_helper.from_array(levels, name), scales, zeros)


def _tensor(name: str, levels: np.ndarray, precision: str) -> TensorProto:
    """Levels rounded to the eight bits of `precision`, ties to even."""
    if precision == "int8":
        rounded = np.clip(np.rint(levels), -127, 127).astype(np.int8)
    else:
        rounded = levels.astype(ml_dtypes.float8_e4m3fn)
    return helper.make_tensor(name, TYPES[precision], levels.shape, rounded.tobytes(), raw=True)
