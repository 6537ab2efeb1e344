"""Linear maps with a window (convolutions, matrices, affine maps, average pools), their sums and compositions."""

from dataclasses import dataclass, replace
from math import gcd, prod

import torch
from torch import Tensor

from fold.nodes import Node


@dataclass(frozen=True)
class Linear:
    """x → W ⊙ x + bias. W is [N_o, N_i / groups, K...]; a matrix has no K.

    `groups` of 0 means one filter [1, 1, K...] for every channel, whatever their number.
    """

    source: str  # what it reads
    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    name: str

    @property
    def num_in(self) -> int:
        """0 if unknown."""
        return self.groups * self.weight.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def span(self) -> tuple[int, ...]:
        """From the first to the last tap, in pixels."""
        return tuple(d * (size - 1) for d, size in zip(self.dilation, self.kernel, strict=True))


def of_node(node: Node) -> Linear:
    """A convolution or a matrix."""
    weight, bias, how = node.tensors["weight"], node.tensors["bias"], node.attributes
    stride, dilation = (tuple(how.get(key, ())) for key in ("stride", "dilation"))
    padding = tuple((before, after) for before, after in how.get("padding", ()))
    return Linear(node.inputs[0], weight, bias, stride, padding, dilation, how.get("groups", 1), node.name)


def per_channel(source: str, name: str, scale: Tensor, shift: Tensor, dims: int) -> Linear:
    """s x + t, of shapes [C], or [1] for any number of channels, as a depthwise map of one tap."""
    weight = scale.view(-1, *[1] * (dims + 1))
    groups = len(scale) if len(scale) > 1 else 0
    return Linear(source, weight, shift.expand(len(scale)), (1,) * dims, ((0, 0),) * dims, (1,) * dims, groups, name)


def average_pool(node: Node) -> Linear:
    """An average pool as a depthwise convolution of equal taps."""
    how, dims = node.attributes, len(node.attributes["size"])
    weight = torch.full((1, 1, *how["size"]), 1 / prod(how["size"]), dtype=torch.float64)
    padding = tuple((size, size) for size in how["padding"])
    stride = tuple(how["stride"])
    return Linear(node.inputs[0], weight, weight.new_zeros(1), stride, padding, (1,) * dims, 0, node.name)


def to_node(linear: Linear, *, equals: str) -> Node:
    """A convolution, or a matrix where there is no window."""
    if not linear.kernel:
        weight = with_groups(linear, 1).weight
        return Node(linear.name, "linear", (linear.source,), {}, {"weight": weight, "bias": linear.bias}, equals)
    stride, dilation = list(linear.stride), list(linear.dilation)
    padding = [list(pair) for pair in linear.padding]
    attributes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": linear.groups}
    tensors = {"weight": linear.weight, "bias": linear.bias}
    return Node(linear.name, "conv", (linear.source,), attributes, tensors, equals)


def added(one: Linear, other: Linear) -> Linear | str:
    """W1 ⊙ x + W2 ⊙ x as one map, or what prevents it."""
    num_in = one.num_in or other.num_in
    one, other = _sized(one, num_in), _sized(other, num_in)
    if len(one.weight) != len(other.weight):
        return f"{len(one.weight)} channels beside {len(other.weight)}"
    if one.stride != other.stride:
        slow, fast = sorted((one, other), key=lambda part: part.stride)
        return f"{_stride(fast)} beside {_stride(slow)}"
    if _outputs(one) != _outputs(other):
        return "their outputs have different sizes"
    groups = gcd(one.groups, other.groups)
    dilations = [b.dilation if prod(a.kernel) == 1 else a.dilation for a, b in ((one, other), (other, one))]
    parts = [replace(with_groups(a, groups), dilation=d) for a, d in zip((one, other), dilations, strict=True)]
    offsets = (a - b for (a, _), (b, _) in zip(one.padding, other.padding, strict=True))
    dilation = parts[0].dilation
    if parts[1].dilation != dilation or any(offset % d for offset, d in zip(offsets, dilation, strict=True)):
        parts = [_undilated(part) for part in parts]
    total = _aligned_sum(*parts)
    # A small dense kernel beside a large depthwise one would become a large dense one.
    ratio = total.weight.numel() / (one.weight.numel() + other.weight.numel())
    return total if ratio <= 1 else f"one convolution would have {ratio:.2g} times the work"


def chained(first: Linear, second: Linear) -> Linear | str:
    """W2 ⊙ (W1 ⊙ x) as one map, where one of the kernels has a single tap, or what prevents it."""
    if first.groups != 1 or second.groups != 1:
        return "a convolution with groups"
    if prod(second.kernel) != 1 and (prod(first.kernel) != 1 or any(size != 1 for size in first.stride)):
        return "neither kernel is 1x1, or the first has a stride"
    if prod(second.kernel) == 1:
        if any(map(any, second.padding)):
            return "zeros are padded between them"
        matrix = second.weight.flatten(1)
        weight = torch.einsum("om,mi...->oi...", matrix, first.weight)
        stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
        merged = replace(first, weight=weight, bias=matrix @ first.bias + second.bias, stride=stride)
    else:
        if any(map(any, first.padding)) or (any(map(any, second.padding)) and first.bias.any()):
            return "a bias would be missing in the zeros that are padded between them"
        matrix = first.weight.flatten(1)
        weight = torch.einsum("om...,mi->oi...", second.weight, matrix)
        bias = second.bias + second.weight.flatten(2).sum(2) @ first.bias
        merged = replace(second, weight=weight, bias=bias)
    if merged.weight.numel() > first.weight.numel() + second.weight.numel():
        return "one convolution would have more work than both"
    return replace(merged, source=first.source, name=second.name)


def with_groups(linear: Linear, groups: int) -> Linear:
    """The same map with fewer groups: zeros where a filter of one group reads channels of another."""
    if groups == linear.groups:
        return linear
    weight, ratio = linear.weight, linear.groups // groups
    num_out, per_group = weight.shape[:2]
    wide = weight.new_zeros(num_out, ratio * per_group, *weight.shape[2:])
    group = torch.arange(num_out) // (num_out // linear.groups)
    columns = (group % ratio)[:, None] * per_group + torch.arange(per_group)
    wide[torch.arange(num_out)[:, None], columns] = weight
    return replace(linear, weight=wide, groups=groups)


def _sized(linear: Linear, num: int) -> Linear:
    """The same map with a filter for each of `num` channels, if their number was unknown."""
    if linear.groups:
        return linear
    weight = linear.weight.expand(num, *linear.weight.shape[1:])
    return replace(linear, weight=weight, bias=linear.bias.expand(num), groups=num)


def _outputs(linear: Linear) -> tuple[int, ...]:
    """How much larger the output is than the input, before the stride."""
    return tuple(before + after - span for (before, after), span in zip(linear.padding, linear.span, strict=True))


def _undilated(linear: Linear) -> Linear:
    """The same taps in a kernel without gaps."""
    weight = linear.weight.new_zeros(*linear.weight.shape[:2], *(span + 1 for span in linear.span))
    weight[(slice(None), slice(None), *(slice(None, None, d) for d in linear.dilation))] = linear.weight
    return replace(linear, weight=weight, dilation=(1,) * len(linear.dilation))


def _aligned_sum(one: Linear, other: Linear) -> Linear:
    """The sum of kernels whose taps lie on one grid, in a window that covers both; named after the larger one."""
    largest = one if one.weight.numel() >= other.weight.numel() else other
    befores, afters = ([max(a[end], b[end]) for a, b in zip(one.padding, other.padding, strict=True)] for end in (0, 1))
    sizes = [
        (max(a - pa, b - pb) + before) // d + 1
        for a, b, (pa, _), (pb, _), before, d in zip(
            one.span, other.span, one.padding, other.padding, befores, one.dilation, strict=True
        )
    ]
    weight = one.weight.new_zeros(*one.weight.shape[:2], *sizes)
    for part in (one, other):
        starts = [(b - p) // d for b, (p, _), d in zip(befores, part.padding, part.dilation, strict=True)]
        window = tuple(slice(start, start + size) for start, size in zip(starts, part.kernel, strict=True))
        weight[(slice(None), slice(None), *window)] += part.weight
    padding = tuple(zip(befores, afters, strict=True))
    return replace(largest, weight=weight, bias=one.bias + other.bias, padding=padding)


def _stride(linear: Linear) -> str:
    """Identity, stride 2, or stride 2x1."""
    sizes = linear.stride[:1] if len({*linear.stride}) == 1 else linear.stride
    return "identity" if linear.name == linear.source else f"stride {'x'.join(map(str, sizes))}"
