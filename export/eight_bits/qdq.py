"""Eight-bit graphs as QuantizeLinear and DequantizeLinear around the operators that run in eight bits.

For TensorRT signed and symmetric throughout, since it has no zero points; a scale for every filter and one for
every activation. Biases stay float32: TensorRT's parser takes no int32 ones.

For ONNX Runtime's CPU kernels unsigned activations with zero points, filters whose sums cannot saturate, and int32
biases: what its optimiser makes QLinearConv of. export/eight_bits/integer.py writes faster graphs, of chains alone.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from common.refusal import Refusal
from export.eight_bits.calibrate import Range, Ranges
from export.eight_bits.integer import levels_of, quantize_filters, usable

LARGEST = {"int8": 127.0, "fp8": float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)}


def to_qdq_onnx(
    model: onnx.ModelProto, ranges: Ranges, *, precision: str, for_onnxruntime: bool = False
) -> onnx.ModelProto:
    """A float32 graph of `to_onnx` with every convolution but the stem in int8 or fp8.

    Quantised are the filters, the inputs of convolutions, and inputs of additions that are not a convolution's output,
    so that δ's identity moves eight bits too; for ONNX Runtime, whatever reads a convolution. `ranges` are those of
    the tensors.
    """
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    if not (integer := {*convolutions[1:]}):
        raise Refusal("the net has no convolution but its first, which stays in float32; export it as fp32")
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph, made_by = quantized.graph, {node.output[0]: node for node in model.graph.node}
    writer = (_UnsignedWriter if for_onnxruntime else _Writer)(graph, ranges, precision)
    find_inputs = _read_by_integers if for_onnxruntime else _quantized_inputs
    for node in graph.node:
        for index in find_inputs(node, integer, made_by):
            node.input[index] = writer.activation(node.input[index])
        if node.name in integer:
            writer.convolution(node)
        writer.nodes.append(node)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(writer.nodes)
    graph.initializer.extend(writer.weights.values())
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def _quantized_inputs(node: NodeProto, integer: set[str], made_by: dict[str, NodeProto]) -> list[int]:
    if node.op_type == "Add" and all(name in made_by for name in node.input):  # of a branch, not of a constant
        return [index for index, name in enumerate(node.input) if made_by[name].op_type != "Conv"]
    return [0] if node.name in integer else []


def _read_by_integers(node: NodeProto, integer: set[str], made_by: dict[str, NodeProto]) -> list[int]:
    """The inputs of a convolution, and inputs that are the output of one, with the ReLU that its kernel includes."""

    def is_of_integers(name: str) -> bool:
        maker = made_by.get(name)
        if maker and maker.op_type == "Relu":
            maker = made_by.get(maker.input[0])
        return maker is not None and maker.name in integer

    if node.op_type == "Conv":
        return [0] if node.name in integer else []
    if node.op_type == "Relu":
        return []
    return [index for index, name in enumerate(node.input) if is_of_integers(name)]


class _Writer:
    """A graph with Q/DQ pairs under construction: one pair for each tensor, however many nodes read it."""

    def __init__(self, graph: onnx.GraphProto, ranges: Ranges, precision: str) -> None:
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes: list[NodeProto] = []
        self._ranges, self._precision = ranges, precision
        self._done: set[str] = set()

    def activation(self, name: str) -> str:
        """The name of tensor `name` after a Q/DQ pair."""
        if name not in self._done:
            scale, zero = self._scale_and_zero(self._ranges[name])
            parameters = self._add(f"{name}.q.scale", np.float32(scale)), self._add(f"{name}.q.zero", zero)
            self._node("QuantizeLinear", f"{name}.q", name, *parameters)
            self._node("DequantizeLinear", f"{name}.dq", f"{name}.q", *parameters)
            self._done.add(name)
        return f"{name}.dq"

    def convolution(self, node: NodeProto) -> None:
        """Quantise the filters of a convolution that reads a Q/DQ pair, with a scale for each that suits its bias."""
        x, weight, *biases = node.input
        x_scale = self._value(f"{x.removesuffix('.dq')}.q.scale")
        bias = self._value(biases[0]).astype(np.float64) if biases else np.zeros(1)
        levels, scales = self._filters(self._value(weight), bias / x_scale)
        node.input[1] = self._dequantized(weight, levels, scales)
        if biases:
            node.input[2] = self._bias(biases[0], bias, (x_scale * scales).astype(np.float32))

    def _filters(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Levels [N_o, ...] and scales [N_o]; a kernel may hold the bias in units of the products."""
        scales = usable(np.abs(weight).reshape(len(weight), -1).max(axis=1) / LARGEST[self._precision], bias)
        return self._rounded(weight / scales.reshape(-1, *[1] * (weight.ndim - 1))), scales

    def _bias(self, name: str, bias: np.ndarray, scales: np.ndarray) -> str:
        """The name of a bias that is added to products with these scales: it stays as it is."""
        return name

    def _scale_and_zero(self, reach: Range) -> tuple[float, np.ndarray]:
        return (max(map(abs, reach)) or 1.0) / LARGEST[self._precision], self._rounded(np.zeros((), np.float32))

    def _rounded(self, levels: np.ndarray) -> np.ndarray:
        """In eight bits, ties to even."""
        if self._precision == "int8":
            return np.clip(np.rint(levels), -127, 127).astype(np.int8)
        return levels.astype(ml_dtypes.float8_e4m3fn)

    def _dequantized(self, name: str, levels: np.ndarray, scales: np.ndarray) -> str:
        """The name of stored levels [N_o, ...] times their scales [N_o]."""
        zeros = np.zeros(scales.shape, levels.dtype)
        inputs = self._add(name, levels), self._add(f"{name}.scale", scales), self._add(f"{name}.zero", zeros)
        return self._node("DequantizeLinear", f"{name}.dq", *inputs, axis=0)

    def _value(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.weights[name])

    def _node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def _add(self, name: str, value: np.ndarray | np.float32) -> str:
        array = np.asarray(value)
        is_float8 = array.dtype == ml_dtypes.float8_e4m3fn
        kind = TensorProto.FLOAT8E4M3FN if is_float8 else helper.np_dtype_to_tensor_dtype(array.dtype)
        self.weights[name] = helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)
        return name


class _UnsignedWriter(_Writer):
    """The same with unsigned activations, zero points and int32 biases."""

    def _filters(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return quantize_filters(weight, bias)

    def _bias(self, name: str, bias: np.ndarray, scales: np.ndarray) -> str:
        return self._dequantized(name, np.rint(bias / scales).astype(np.int32), scales)

    def _scale_and_zero(self, reach: Range) -> tuple[float, np.ndarray]:
        scale, zero = levels_of(reach)
        return float(scale), np.asarray(zero, np.uint8)
