"""PyTorch: an .onnx file of this project on a GPU as CUDA graphs, one for each batch size, where there is no TensorRT.

The precision is that of the file. It knows the operations that export/graphs/ writes in float32 and float16, and no
others. export/runtimes/load.py imports it where it is chosen by name: it needs torch, and the rest of serving does not.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from common.files import read_whole, sha256
from common.refusal import Refusal, one_line
from export.model_file.onnx_reader import read_header
from export.runtimes import gpu
from export.runtimes.runtime import Model, answer_in_pieces, next_power_of_two
from train.machine import forbid_tf32

LARGEST = 256  # images in one graph; more are cut in pieces
NUM_WARM_UPS = 3  # before a capture, as PyTorch's own make_graphed_callables has it
_CAPTURING = threading.Lock()  # PyTorch can do one at a time in a process
# Streams of models that are gone, by device. PyTorch keeps scratch memory for every stream, which would grow with each
# reload.
_IDLE: dict[int, list[torch.cuda.Stream]] = defaultdict(list)

Sizes = list[int]  # of the spatial dimensions
# A node: its function, its inputs, its output, and those inputs that no later node reads.
Step = tuple[Callable[..., Tensor], tuple[str, ...], str, tuple[str, ...]]


@dataclass(frozen=True)
class TorchNet:
    """images uint8 [N, H, W, C] → logits float32 [N, K], where its tensors are."""

    steps: tuple[Step, ...]
    tensors: Mapping[str, Tensor]
    input_name: str
    precision: str

    def __call__(self, images: Tensor) -> Tensor:
        values, x = {**self.tensors, self.input_name: images}, images
        for compute, inputs, output, spent in self.steps:
            x = values[output] = compute(*(values[name] for name in inputs))
            for name in spent:
                del values[name]
        return x

    def to(self, device: torch.device) -> "TorchNet":
        """The net with its weights on `device`; whole numbers, which are settings, stay with the host."""
        floats = {name: tensor.to(device) for name, tensor in self.tensors.items() if tensor.is_floating_point()}
        return replace(self, tensors={**self.tensors, **floats})


class TorchGraphs:
    """The net of a file; `model` and `description` as in `Runtime`.

    Without a GPU, if `device` is None, the same net runs on the CPU without graphs: for trying it, not for speed.
    """

    platform = "pytorch_onnx"

    def __init__(self, path: Path, *, device: int | None = None) -> None:
        content = read_whole(path)
        header = read_header(path, content)
        if header.spec is None:
            raise Refusal(f"{path} is not a model of this project; use --runtime onnxruntime")
        if device is not None and device >= torch.cuda.device_count():
            raise Refusal(f"PyTorch finds no CUDA device {device} here; leave the device out to use the CPU")
        net = read_net(path, content)
        self.model = Model(header.spec.name, sha256(content), header.spec, header.provenance, num_bytes=len(content))
        self.library = f"torch {torch.__version__}"
        if device is None and not torch.cuda.is_available():
            answer = torch.no_grad()(lambda images: net(torch.tensor(images)).numpy())
            self._answer, self.description = answer, f"PyTorch on the CPU, {net.precision}"
        else:
            self._answer, self.description = Graphs(net, device or 0), f"PyTorch, CUDA graphs, {net.precision}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._answer(images)


class Graphs:
    """A net on one stream of a device. Batches are padded to the next power of two, which has a graph of its own.

    All graphs share one memory for activations, as they run one after another. Its memory on
    the device returns to PyTorch with the last reference to it.
    """

    def __init__(self, net: TorchNet, device: int) -> None:
        forbid_tf32()
        torch.backends.cudnn.benchmark = True  # the fastest kernels for each size, found before it is captured
        self._place = _place(device)
        self._stream = _IDLE[device].pop() if _IDLE[device] else torch.cuda.Stream(device)
        gpu.when_gone(self, _IDLE[device].append, self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._batches: dict[int, Callable[[np.ndarray], np.ndarray]] = {}
        with torch.cuda.stream(self._stream):
            self._net = net.to(self._place)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return answer_in_pieces(self._run, images, LARGEST, next_power_of_two)

    def _run(self, images: np.ndarray) -> np.ndarray:
        if len(images) not in self._batches:
            self._batches[len(images)] = self._capture(images.shape)
        return self._batches[len(images)](images)

    @torch.no_grad()
    def _capture(self, shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
        """The net for images of `shape`: a graph that reads and writes where it did when it was captured.

        A capture may neither wait nor have cuDNN try its kernels: the first runs, which do both, are not captured.
        In other threads another model may go on meanwhile.
        """
        stream = self._stream
        with _CAPTURING, torch.cuda.stream(stream):
            on_device = torch.zeros(shape, dtype=torch.uint8, device=self._place)
            for _ in range(NUM_WARM_UPS):
                self._net(on_device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = self._net(on_device)
        pixels, answers = _pinned(shape, torch.uint8), _pinned(logits.shape, logits.dtype)

        def answer(images: np.ndarray) -> np.ndarray:
            np.copyto(pixels.numpy(), images)
            with torch.cuda.stream(stream):
                on_device.copy_(pixels, non_blocking=True)
                graph.replay()
                answers.copy_(logits, non_blocking=True)
            stream.synchronize()
            return answers.numpy().copy()

        return answer


def _place(device: int) -> torch.device:
    return torch.device("cuda", device)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Page-locked memory, which the device reads and writes by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def read_net(path: Path, content: bytes) -> TorchNet:
    """The net of an ONNX file, on the CPU; refuses a damaged file and unknown operations."""
    try:
        model = onnx.load_model_from_string(content)
        if kinds := {node.op_type for node in model.graph.node if node.domain or node.op_type not in OPERATIONS}:
            raise Refusal(f"{path}: PyTorch does not run {', '.join(sorted(kinds))} here; use --runtime onnxruntime")
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise Refusal(f"{path} cannot be loaded as an ONNX model: {one_line(error)}") from error
    graph = model.graph
    tensors = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
    is_half = any(tensor.dtype == torch.float16 for tensor in tensors.values())
    last_read = {name: index for index, node in enumerate(graph.node) for name in node.input}
    steps: list[Step] = []
    for index, node in enumerate(graph.node):
        how = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        spent = tuple(name for name in dict.fromkeys(node.input) if last_read[name] == index)
        steps.append((partial(OPERATIONS[node.op_type], **how), tuple(node.input), node.output[0], spent))
    return TorchNet(tuple(steps), tensors, graph.input[0].name, "fp16" if is_half else "fp32")


def _tensor(tensor: onnx.TensorProto) -> Tensor:
    """Weights of convolutions have their channels last, as images and all that follows from them."""
    value = torch.tensor(numpy_helper.to_array(tensor))
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


# Operations: tensors in ONNX's order, attributes by ONNX's names. Attributes that export/graphs/ never writes are not
# named here, so that they raise an error.


def _convolution(
    x: Tensor,
    weight: Tensor,
    *bias: Tensor,
    kernel_shape: Sizes,
    pads: Sizes,
    strides: Sizes,
    dilations: Sizes,
    group: int,
) -> Tensor:
    x, padding = _padded(x, pads, 0.0)
    convolve = getattr(F, f"conv{len(kernel_shape)}d")
    return convolve(x, weight, *bias, stride=strides, padding=padding, dilation=dilations, groups=group)


def _max_pool(x: Tensor, *, kernel_shape: Sizes, pads: Sizes, strides: Sizes, dilations: Sizes | None = None) -> Tensor:
    x, padding = _padded(x, pads, -torch.inf)
    pool = getattr(F, f"max_pool{len(kernel_shape)}d")
    return pool(x, kernel_shape, stride=strides, padding=padding, dilation=dilations or 1)


def _average_pool(x: Tensor, *, kernel_shape: Sizes, pads: Sizes, strides: Sizes, count_include_pad: int) -> Tensor:
    pool = getattr(F, f"avg_pool{len(kernel_shape)}d")
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
    start, stop, _ = slice(start, stop).indices(x.shape[axis])  # negative ends count from the last
    return x.narrow(axis, start, stop - start)


TYPES = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.FLOAT16: torch.float16}
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
