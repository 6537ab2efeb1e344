"""PyTorch: the graph of an .onnx file of ours as a function of tensors, in the precision that the file has.

It knows the operations that export/graphs/ writes in float32 and float16, and no others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from common.refusal import Refusal

# By the number of spatial dimensions.
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOLS: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
TYPES = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.FLOAT16: torch.float16}
NAMES = {torch.float32: "fp32", torch.float16: "fp16"}

Sizes = list[int]  # of the spatial dimensions


@dataclass(frozen=True)
class Step:
    """One node of the graph."""

    compute: Callable[..., Tensor]
    inputs: tuple[str, ...]
    output: str
    spent: tuple[str, ...]  # what no later node reads


@dataclass(frozen=True)
class TorchNet:
    """images uint8 [N, H, W, C] → logits float32 [N, K], where its tensors are."""

    steps: tuple[Step, ...]
    tensors: Mapping[str, Tensor]
    input_name: str
    precision: str

    def __call__(self, images: Tensor) -> Tensor:
        values, x = {**self.tensors, self.input_name: images}, images
        for step in self.steps:
            x = values[step.output] = step.compute(*(values[name] for name in step.inputs))
            for name in step.spent:
                del values[name]
        return x

    def to(self, device: torch.device) -> "TorchNet":
        """The net with its weights on `device`; whole numbers, which are settings, stay with the host."""
        moved = {
            name: tensor.to(device) if tensor.is_floating_point() else tensor for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=moved)


def read_net(path: Path, content: bytes) -> TorchNet:
    """The net of an ONNX file, on the CPU; refuses a damaged file and unknown operations."""
    try:
        model = onnx.load_model_from_string(content)
        kinds = {node.op_type for node in model.graph.node if node.domain or node.op_type not in OPERATIONS}
        if kinds:
            raise Refusal(f"{path}: PyTorch does not run {', '.join(sorted(kinds))} here; use --runtime onnxruntime")
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise Refusal(f"{path} cannot be loaded as an ONNX model: {str(error).strip().splitlines()[0]}") from error
    graph = model.graph
    tensors = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
    is_half = any(tensor.dtype == torch.float16 for tensor in tensors.values())
    last_read = {name: index for index, node in enumerate(graph.node) for name in node.input}
    steps = tuple(
        Step(
            partial(OPERATIONS[node.op_type], **_attributes(node)),
            tuple(node.input),
            node.output[0],
            tuple(name for name in dict.fromkeys(node.input) if last_read[name] == index),
        )
        for index, node in enumerate(graph.node)
    )
    return TorchNet(steps, tensors, graph.input[0].name, NAMES[torch.float16 if is_half else torch.float32])


def _tensor(tensor: onnx.TensorProto) -> Tensor:
    """Weights of convolutions have their channels last, as images and all that follows from them."""
    value = torch.tensor(numpy_helper.to_array(tensor))
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


# Operations: tensors in ONNX's order, attributes by ONNX's names. Attributes that export/graphs/ never writes are not
# named here, so that they raise an error.


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_shape: Sizes,
    pads: Sizes,
    strides: Sizes,
    dilations: Sizes,
    group: int,
) -> Tensor:
    x, padding = _padded(x, pads, 0.0)
    convolve = CONVOLUTIONS[len(kernel_shape)]
    return convolve(x, weight, bias, stride=strides, padding=padding, dilation=dilations, groups=group)


def _max_pool(x: Tensor, *, kernel_shape: Sizes, pads: Sizes, strides: Sizes, dilations: Sizes | None = None) -> Tensor:
    x, padding = _padded(x, pads, -torch.inf)
    pool = MAX_POOLS[len(kernel_shape)]
    return pool(x, kernel_shape, stride=strides, padding=padding, dilation=dilations or 1)


def _average_pool(x: Tensor, *, kernel_shape: Sizes, pads: Sizes, strides: Sizes, count_include_pad: int) -> Tensor:
    pool = AVERAGE_POOLS[len(kernel_shape)]
    padded, padding = _padded(x, pads, 0.0)
    mean = pool(padded, kernel_shape, stride=strides, padding=padding)
    if count_include_pad or not any(pads):
        return mean
    ones, _ = _padded(torch.ones_like(x), pads, 0.0)
    return mean / pool(ones, kernel_shape, stride=strides, padding=padding)


def _padded(x: Tensor, pads: Sizes, value: float) -> tuple[Tensor, Sizes]:
    """x padded by `value` where both sides differ, and the padding that is left for the operation itself."""
    num = len(pads) // 2
    if pads[:num] == pads[num:]:
        return x, pads[:num]
    return F.pad(x, _last_first(pads), value=value), [0] * num


def _last_first(pads: Sizes) -> Sizes:
    """ONNX's padding (beginnings, then ends) in the order of `F.pad`: both sides of the last dimension first."""
    num = len(pads) // 2
    return [size for pair in reversed([*zip(pads[:num], pads[num:], strict=True)]) for size in pair]


def _slice(x: Tensor, starts: Tensor, stops: Tensor, axes: Tensor) -> Tensor:
    (start,), (stop,), (axis,) = starts.tolist(), stops.tolist(), axes.tolist()
    return x.narrow(axis, start, min(stop, x.shape[axis]) - start)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "AveragePool": _average_pool,
    "Cast": lambda x, *, to: x.to(TYPES[to]),
    "Clip": lambda x, low, high: torch.clamp(x, low, high),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": _convolution,
    "Div": torch.div,
    "Erf": torch.erf,
    "Flatten": lambda x, *, axis=1: x.flatten(axis),
    "Gemm": lambda x, weight, bias, *, transB: F.linear(x, weight if transB else weight.T, bias),
    "GlobalAveragePool": lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
    "HardSigmoid": lambda x, *, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "HardSwish": F.hardswish,
    "LeakyRelu": lambda x, *, alpha: F.leaky_relu(x, alpha),
    "MatMul": torch.matmul,
    "MaxPool": _max_pool,
    "Min": torch.minimum,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Pad": lambda x, pads: F.pad(x, _last_first(pads.tolist())),
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda x, *, perm: x.permute(perm),
}
