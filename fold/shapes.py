"""The shapes of a graph's outputs, inferred from its nodes: the check of a graph that comes from a file.

Attributes and sizes are checked before anything is computed, so that a small file cannot request much memory.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, prod
from typing import Any

import torch

from common.refusal import Refusal
from fold.nodes import Graph, Node

Shape = tuple[int, ...]  # of one image's output, without the batch: (C, H, W) or (K,)

MAX_NODES = 10_000
LARGEST_SIZE = 2**16  # of a window, a stride or a padding
MOST_VALUES = 2**28  # of one image's output: a gigabyte in float32


def infer_shapes(graph: Graph, image: Shape) -> dict[str, Shape]:
    """The shape of every node's output for an image [H, W, C], by name; refuses, by name, a node that does not fit.

    Checks what `Graph.check` does not: attributes, numbers of inputs, shapes and dtypes of tensors.
    """
    if len(graph.nodes) > MAX_NODES:
        raise Refusal(f"the graph has {len(graph.nodes)} nodes, over the limit of {MAX_NODES:,}")
    shapes: dict[str, Shape] = {}
    for node in graph.nodes:
        try:
            _check_attributes(node)
            shape = image if node.op == "input" else _shape(node, [shapes[name] for name in node.inputs])
        except _Misfit as misfit:
            raise Refusal(f"{node.name}: {node.op} {misfit}") from misfit
        if min(shape, default=0) < 1 or prod(shape) > MOST_VALUES:
            raise Refusal(f"{node.name}: {node.op} would give {list(shape)} for each image")
        shapes[node.name] = shape
    return shapes


class _Misfit(Exception):
    """What is wrong with a node, as a predicate of its operation."""


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= LARGEST_SIZE


def _is_end(value: Any) -> bool:
    """The end of a slice; a negative one counts from the last channel."""
    return type(value) is int and abs(value) <= LARGEST_SIZE


def _wholes(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and 1 <= len(value) <= 3 and all(_is_whole(v, least) for v in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _pairs(value: Any) -> bool:
    return isinstance(value, list) and all(_wholes(0)(pair) and len(pair) == 2 for pair in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _yes_no(value: Any) -> bool:
    return type(value) is bool


def _rank(value: Any) -> bool:
    return value is None or (_is_whole(value, 2) and value <= 5)


_SIZES, _STEPS = _wholes(1), _wholes(0)
# The attributes of each operation and what they may be; those in OPTIONAL may be missing.
ATTRIBUTES: dict[str, dict[str, Callable[[Any], bool]]] = {
    "input": {"rank": _rank},
    "conv": {"stride": _SIZES, "padding": _pairs, "dilation": _SIZES, "groups": lambda value: _is_whole(value, 1)},
    "affine": {"rank": _rank},
    "slice": {"start": _is_end, "stop": lambda value: value is None or _is_end(value)},
    "pad": {"padding": _pairs},
    "clip": {"low": _number, "high": _number},
    "leaky_relu": {"slope": _number},
    "gelu": {"approximate": lambda value: value in ("none", "tanh")},
    "max_pool": {"size": _SIZES, "stride": _SIZES, "padding": _STEPS, "dilation": _SIZES, "ceil": _yes_no},
    "avg_pool": {"size": _SIZES, "stride": _SIZES, "padding": _STEPS, "ceil": _yes_no, "count_padding": _yes_no},
}
OPTIONAL = ("rank",)
NUM_INPUTS = {"input": (0, 0), "add": (2, MAX_NODES), "mul": (2, 2), "cat": (1, MAX_NODES)}  # others: one


def _check_attributes(node: Node) -> None:
    allowed = ATTRIBUTES.get(node.op, {})
    least, most = NUM_INPUTS.get(node.op, (1, 1))
    if not least <= len(node.inputs) <= most:
        raise _Misfit(f"reads {len(node.inputs)} nodes")
    missing = allowed.keys() - node.attributes.keys() - set(OPTIONAL)
    wrong = [key for key, value in node.attributes.items() if key not in allowed or not allowed[key](value)]
    if missing or wrong:
        raise _Misfit(f"has missing or invalid attributes: {', '.join(sorted({*missing, *wrong}))}")


def _shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    x = inputs[0]
    match node.op:
        case "normalize":
            _expect(node, {key: [(x[-1], 1, 1)] for key in ("offset", "scale")})
            _need(len(x) == 3, f"reads {list(x)}, not an image [H, W, C]")
            return x[2], x[0], x[1]
        case "conv":
            return _convolution(node, x)
        case "linear":
            weight = node.tensors["weight"]
            _need(weight.dim() == 2 and weight.shape[1] == x[-1], f"of {list(weight.shape)} reads {list(x)}")
            _expect(node, {"weight": [tuple(weight.shape)], "bias": [(weight.shape[0],)]})
            return (*x[:-1], weight.shape[0])
        case "affine":
            _expect(node, {"scale": [(1,), (x[0],)], "shift": [(1,), (x[0],)]})
            return x
        case "add" | "mul":
            return _broadcast(inputs)
        case "cat":
            _need(len({shape[1:] for shape in inputs}) == 1, f"joins {', '.join(str(list(s)) for s in inputs)}")
            return (sum(shape[0] for shape in inputs), *x[1:])
        case "slice":
            return (len(range(x[0])[node.attributes["start"] : node.attributes["stop"]]), *x[1:])
        case "pad":
            pairs = _of_space(node, x, "padding")
            return (x[0], *(size + before + after for size, (before, after) in zip(x[1:], pairs, strict=True)))
        case "ncrelu":
            return (2 * x[0], *x[1:])
        case "max_pool" | "avg_pool":
            return _pool(node, x)
        case "global_pool":
            _need(len(x) > 1, f"reads {list(x)}, without spatial dimensions")
            return (x[0], *[1] * (len(x) - 1))
        case "flatten":
            return (prod(x),)
        case _:
            return x


def _convolution(node: Node, x: Shape) -> Shape:
    weight, groups = node.tensors["weight"], node.attributes["groups"]
    _need(weight.dim() == len(x) + 1 and weight.dim() in (3, 4, 5), f"of {list(weight.shape)} reads {list(x)}")
    num_out, per_group, *kernel = weight.shape
    _need(per_group * groups == x[0] and num_out % groups == 0, f"of {list(weight.shape)} reads {x[0]} channels")
    _expect(node, {"weight": [tuple(weight.shape)], "bias": [(num_out,)]})
    how = [_of_space(node, x, key) for key in ("padding", "dilation", "stride")]
    sizes = (
        (size + before + after - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, (before, after), dilation, stride in zip(x[1:], kernel, *how, strict=True)
    )
    return (num_out, *sizes)


def _pool(node: Node, x: Shape) -> Shape:
    sizes, strides, paddings = (_of_space(node, x, key) for key in ("size", "stride", "padding"))
    dilations = _of_space(node, x, "dilation") if node.op == "max_pool" else [1] * len(sizes)
    spans = [dilation * (size - 1) + 1 for size, dilation in zip(sizes, dilations, strict=True)]
    _need(all(2 * pad <= span for pad, span in zip(paddings, spans, strict=True)), "pads more than half its window")
    windows = zip(x[1:], sizes, strides, paddings, dilations, strict=True)
    return (x[0], *(pooled(*window, ceil=node.attributes["ceil"]) for window in windows))


def pooled(size: int, window: int, stride: int, padding: int, dilation: int, *, ceil: bool) -> int:
    """The number of windows. With `ceil`, the last may reach beyond the padding, but not start there."""
    room = size + 2 * padding - dilation * (window - 1) - 1
    num = (room + stride - 1 if ceil else room) // stride + 1
    return num - 1 if ceil and (num - 1) * stride >= size + padding else num


def _of_space(node: Node, x: Shape, key: str) -> Sequence[Any]:
    """An attribute with an entry for every spatial dimension."""
    values = node.attributes[key]
    _need(len(values) == len(x) - 1, f"has {key} {values} for {len(x) - 1} spatial dimensions")
    return values


def _broadcast(inputs: Sequence[Shape]) -> Shape:
    """The shape of a sum or product; sizes of 1 are repeated."""
    shown = " and ".join(str(list(shape)) for shape in inputs)
    _need(len({len(shape) for shape in inputs}) == 1, f"reads {shown}")
    sizes = [{*sizes} - {1} for sizes in zip(*inputs, strict=True)]
    _need(all(len(size) < 2 for size in sizes), f"reads {shown}")
    return tuple(next(iter(size), 1) for size in sizes)


def _expect(node: Node, shapes: Mapping[str, Sequence[Shape]]) -> None:
    for key, allowed in shapes.items():
        tensor = node.tensors[key]
        _need(tensor.dtype in (torch.float32, torch.float64), f"has {key} of {tensor.dtype}, not float32")
        _need(tuple(tensor.shape) in allowed, f"has {key} of shape {list(tensor.shape)}, not {list(allowed[-1])}")


def _need(fits: bool, otherwise: str) -> None:
    if not fits:
        raise _Misfit(otherwise)
