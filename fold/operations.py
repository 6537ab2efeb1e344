"""How PyTorch's layers and functions are written as nodes. Each function takes the arguments of its namesake."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fold.nodes import Node, rank_after
from train.layers import DiracConv1d, DiracConv2d, DiracConv3d, NCReLU, Normalize, dirac_weight


class NotListed(Exception):
    """An operation, or a form of it, that a graph cannot express; says which and why."""


class Ref(str):
    """The name of a node, in place of a traced value while the graph is written."""

    __slots__ = ()


class Builder:
    """A graph under construction; `path` is the module of the user's net that the next node belongs to."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.path = ""
        self._names: set[str] = set()
        self._ranks: dict[str, int | None] = {}

    def add(self, op: str, *inputs: Ref, tensors: dict[str, Tensor] | None = None, **attributes: Any) -> Ref:
        """Append a node, named after the path and made unique."""
        name, number = self.path or op, 1
        if name in self._names:
            name = f"{name}.{op}"
        while name in self._names:
            number += 1
            name = f"{self.path or op}.{op}{number}"
        self._names.add(name)
        node = Node(name, op, tuple(inputs), attributes, tensors or {})
        self._ranks[name] = rank_after(node, self._ranks)
        self.nodes.append(node)
        return Ref(name)

    def rank(self, source: Ref) -> int | None:
        return self._ranks[source]


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def each(value: Any, dims: int) -> list[int]:
    """A number for each spatial dimension."""
    values = [value] if isinstance(value, int) else list(cast("Iterable[int]", value))
    return [int(size) for size in (values * dims if len(values) == 1 else values)]


def weights(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    weight = double(weight)
    return {"weight": weight, "bias": weight.new_zeros(len(weight)) if bias is None else double(bias)}


def convolve(
    b: Builder,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Ref:
    dims = weight.dim() - 2
    stride, dilation = each(stride, dims), each(dilation, dims)
    if b.rank(input) not in (None, dims + 2):
        raise NotListed(f"a convolution of {dims} spatial dimensions reads {b.rank(input)} dimensions: give a batch")
    spans = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    match padding:
        case "same":
            pairs = [[span // 2, span - span // 2] for span in spans]
        case "valid":
            pairs = [[0, 0]] * dims
        case _:
            pairs = [[size, size] for size in each(padding, dims)]
    how: dict[str, Any] = {"stride": stride, "padding": pairs, "dilation": dilation, "groups": groups}
    return b.add("conv", input, tensors=weights(weight, bias), **how)


def linear(b: Builder, input: Ref, weight: Tensor, bias: Tensor | None = None) -> Ref:
    return b.add("linear", input, tensors=weights(weight, bias))


def fold_batch_norm(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """y = s x + (β − s mean), s = γ / √(var + ε): the scale and the shift, each [C]."""
    scale = 1 / torch.sqrt(var + epsilon)
    if gamma is not None:
        scale = gamma * scale
    return scale, -scale * mean if beta is None else beta - scale * mean


def batch_norm(
    b: Builder,
    input: Ref,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    **known: Any,
) -> Ref:
    if running_mean is None or running_var is None:
        raise NotListed("batch norm without running statistics depends on the batch: train with track_running_stats")
    if training:
        raise NotListed("batch norm in training mode depends on the batch: call net.eval()")
    mean, var = double(running_mean), double(running_var)
    gamma, beta = (None if parameter is None else double(parameter) for parameter in (weight, bias))
    # Of a skeleton. To compute with shapes, PyTorch would import its compiler, which takes a second.
    scale, shift = (mean, mean) if mean.is_meta else fold_batch_norm(gamma, beta, mean, var, eps)
    return b.add("affine", input, tensors={"scale": scale, "shift": shift}, **known)


def add(b: Builder, input: Any, other: Any, alpha: float = 1) -> Any:
    if alpha != 1:
        raise NotListed("a sum with alpha")
    return combine("add", b, input, other)


def sub(b: Builder, input: Any, other: Any, alpha: float = 1) -> Any:
    """x − y = x + (−1) y."""
    return add(b, input, combine("mul", b, other, -1.0) if isinstance(other, Ref) else -other, alpha)


def combine(op: str, b: Builder, input: Any, other: Any) -> Any:
    """A sum or a product of two traced values, or of one with constants per channel."""
    if isinstance(input, Ref) and isinstance(other, Ref):
        return b.add(op, input, other)
    value, constant = (input, other) if isinstance(input, Ref) else (other, input)
    values = channel_constants(b, value, constant)
    scale, shift = (values, torch.zeros_like(values)) if op == "mul" else (torch.ones_like(values), values)
    return b.add("affine", value, tensors={"scale": scale, "shift": shift})


def channel_constants(b: Builder, value: Ref, constant: Any) -> Tensor:
    """A constant for all channels as [1], or one for each as [C]; refuses others."""
    if isinstance(constant, int | float):
        return torch.tensor([float(constant)], dtype=torch.float64)
    constants = double(constant)
    if constants.numel() == 1:
        return constants.reshape(1)
    large = [axis for axis, size in enumerate(constants.shape) if size > 1]
    rank = b.rank(value)
    # Broadcasting aligns axes from the right: the channels of [N, C, ...] come right before the spatial dimensions.
    if len(large) != 1 or rank is None or constants.dim() - large[0] != rank - 1:
        raise NotListed(f"constants of shape {list(constants.shape)} that are not one for each channel")
    return constants.flatten()


def window(dims: int, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool) -> dict[str, Any]:
    size = each(kernel_size, dims)
    strides = each(stride, dims) if stride else size
    return {"size": size, "stride": strides, "padding": each(padding, dims), "ceil": bool(ceil_mode)}


def max_pool(
    dims: int,
    b: Builder,
    input: Ref,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Ref:
    if return_indices:
        raise NotListed("max-pooling that returns indices")
    how = window(dims, kernel_size, stride, padding, ceil_mode)
    return b.add("max_pool", input, **how, dilation=each(dilation, dims))


def avg_pool(
    dims: int,
    b: Builder,
    input: Ref,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Ref:
    if divisor_override is not None:
        raise NotListed("average pooling with a divisor of its own")
    how = window(dims, kernel_size, stride, padding, ceil_mode)
    return b.add("avg_pool", input, **how, count_padding=bool(count_include_pad))


def adaptive_avg_pool(dims: int, b: Builder, input: Ref, output_size: Any) -> Ref:
    if any(size != 1 for size in each(output_size, dims)):
        raise NotListed(f"adaptive pooling to {output_size}, only to 1 is supported")
    if b.rank(input) not in (None, dims + 2):
        raise NotListed(f"pooling of {dims} spatial dimensions reads {b.rank(input)} dimensions: give a batch")
    return b.add("global_pool", input)


def mean(b: Builder, input: Ref, dim: Any = None, keepdim: bool = False) -> Ref:
    rank = b.rank(input)
    axes = sorted(axis % rank for axis in each(dim, 1)) if rank and dim is not None else []
    if not rank or axes != list(range(2, rank)) or not axes:
        raise NotListed(f"a mean over {dim}, only over all spatial dimensions is supported")
    pooled = b.add("global_pool", input)
    return pooled if keepdim else b.add("flatten", pooled)


def flatten(b: Builder, input: Ref, start_dim: int = 0, end_dim: int = -1) -> Ref:
    rank = b.rank(input)
    if start_dim != 1 or end_dim not in (-1, (rank or 0) - 1):
        raise NotListed(f"flatten from {start_dim} to {end_dim}, only from 1 to the end is supported")
    return input if rank == 2 else b.add("flatten", input)


def cat(b: Builder, tensors: Sequence[Any], dim: int = 0) -> Ref:
    rank = b.rank(tensors[0])
    if (dim if dim >= 0 or rank is None else dim + rank) != 1 or not all(isinstance(part, Ref) for part in tensors):
        raise NotListed(f"a concatenation along {dim}, only of channels is supported")
    return b.add("cat", *tensors)


def pad(b: Builder, input: Ref, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Ref:
    rank, ends = b.rank(input), [int(end) for end in pad]
    if rank is None:
        raise NotListed("padding of an open number of dimensions: give an example batch")
    if mode != "constant":
        raise NotListed(f"padding with {mode}, only with zeros is supported")
    if value not in (None, 0) or len(ends) > 2 * (rank - 2) or min(ends) < 0:
        raise NotListed("padding with anything but zeros around an image")
    if not any(ends):
        return input
    ends += [0] * (2 * (rank - 2) - len(ends))
    pairs = [[ends[at], ends[at + 1]] for at in range(len(ends) - 2, -1, -2)]
    return b.add("pad", input, padding=pairs)


def getitem(b: Builder, input: Ref, index: Any) -> Ref:
    batch, channels, *rest = cast("tuple[Any, ...]", index) if isinstance(index, tuple) else (index, None)
    channels = cast("slice[Any, Any, Any] | None", channels)
    whole = batch == slice(None) and all(part in (slice(None), Ellipsis) for part in rest)
    if not whole or not isinstance(channels, slice) or channels.step is not None:
        raise NotListed(f"indexing with {index}, only of channels is supported")
    return b.add("slice", input, start=channels.start or 0, stop=channels.stop)


def hardtanh(b: Builder, input: Ref, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Ref:
    return b.add("clip", input, low=float(min_val), high=float(max_val))


def leaky_relu(b: Builder, input: Ref, negative_slope: float = 0.01, inplace: bool = False) -> Ref:
    return b.add("leaky_relu", input, slope=float(negative_slope))


def relu6(b: Builder, input: Ref, inplace: bool = False) -> Ref:
    return hardtanh(b, input, 0.0, 6.0)


def gelu(b: Builder, input: Ref, approximate: str = "none") -> Ref:
    return b.add("gelu", input, approximate=approximate)


def ncrelu(b: Builder, x: Ref, dims: int | None = None) -> Ref:
    return b.add("ncrelu", x)


def unchanged(b: Builder, input: Ref, *args: Any, **how: Any) -> Ref:
    return input


def dropout(b: Builder, input: Ref, p: float = 0.5, training: bool = True, inplace: bool = False) -> Ref:
    if training and p:
        raise NotListed("dropout in training mode: call net.eval()")
    return input


def elementwise(op: str, b: Builder, input: Ref, inplace: bool = False) -> Ref:
    return b.add(op, input)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{op: partial(elementwise, op) for op in ("relu", "silu", "sigmoid", "hardswish", "hardsigmoid", "tanh")},
    **{f"conv{dims}d": convolve for dims in (1, 2, 3)},
    **{f"max_pool{dims}d": partial(max_pool, dims) for dims in (1, 2, 3)},
    **{f"avg_pool{dims}d": partial(avg_pool, dims) for dims in (1, 2, 3)},
    **{f"adaptive_avg_pool{dims}d": partial(adaptive_avg_pool, dims) for dims in (1, 2, 3)},
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    **dict.fromkeys(("contiguous", "clone", "detach"), unchanged),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), dropout),
    **{function.__name__: function for function in (add, sub, linear, batch_norm, mean, flatten, pad, getitem)},
    **{function.__name__: function for function in (relu6, hardtanh, leaky_relu, gelu, ncrelu)},
    "mul": partial(combine, "mul"),
}


def dirac_layer(b: Builder, layer: Any, x: Ref) -> Ref:
    weight = layer.weight
    if not weight.is_meta:
        b_norm = None if layer.b is None else double(layer.b)
        weight = dirac_weight(double(layer.a), b_norm, double(layer.delta), double(weight))  # eq. 4
    if layer.padding_mode != "zeros":
        raise NotListed(f"padding with {layer.padding_mode}, only with zeros is supported")
    return convolve(b, x, weight, layer.bias, layer.stride, layer.padding, layer.dilation)


def batch_norm_layer(b: Builder, layer: Any, x: Ref) -> Ref:
    # A layer without running statistics takes the batch's in any mode.
    whole = (layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training)
    ranks = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
    known = {"rank": ranks[type(layer)]} if type(layer) in ranks else {}
    return batch_norm(b, x, *whole, eps=layer.eps, **known)


def normalize_layer(b: Builder, layer: Any, x: Ref) -> Ref:
    return b.add("normalize", x, tensors={"offset": double(layer.offset), "scale": double(layer.scale)})


# Layers that become nodes as a whole.
LAYERS: dict[type[nn.Module], Callable[[Builder, Any, Ref], Ref]] = {
    **dict.fromkeys((DiracConv1d, DiracConv2d, DiracConv3d), dirac_layer),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), batch_norm_layer),
    NCReLU: lambda b, layer, x: b.add("ncrelu", x),
    Normalize: normalize_layer,
}
# Layers of PyTorch whose forward is a call of one of FUNCTIONS.
OF_FUNCTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Identity, nn.Flatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU),
    *(nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Tanh),
)
