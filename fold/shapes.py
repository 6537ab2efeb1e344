"""The shapes of a graph's outputs, inferred from its nodes: the check of a graph that comes from a file.

Attributes and sizes are checked before anything is computed, so that a small file cannot request much memory.
"""

from collections.abc import Callable, Sequence
from math import isfinite, prod
from typing import Any, cast

import torch
from torch import Tensor

from common.refusal import Refusal, one_line
from fold.nodes import Graph, Node, run

Shape = tuple[int, ...]  # of one image's output, without the batch: (C, H, W) or (K,)

MAX_NODES = 10_000
LARGEST_SIZE = 2**16  # of a window, a stride or a padding
MOST_VALUES = 2**28  # of one image's output: a gigabyte in float32


def infer_shapes(graph: Graph, image: Shape) -> dict[str, Shape]:
    """The shape of every node's output for an image [H, W, C], by name; refuses, by name, a node that does not fit.

    Checks what `Graph.check` does not: attributes, numbers of inputs, shapes and dtypes of tensors. The graph runs on a
    batch of no images, so that nothing is computed.
    """
    if len(graph.nodes) > MAX_NODES:
        raise Refusal(f"the graph has {len(graph.nodes)} nodes, over the limit of {MAX_NODES:,}")
    dtype = next((tensor.dtype for tensor in graph.tensors().values()), torch.float32)
    outputs: dict[str, Tensor] = {}
    for node in graph.nodes:
        _check_attributes(node)
        inputs = [outputs[name] for name in node.inputs]
        output = outputs[node.name] = _output(node, inputs) if inputs else torch.zeros(0, *image, dtype=dtype)
        shape = output.shape[1:]
        if min(shape, default=0) < 1 or prod(shape) > MOST_VALUES:
            raise Refusal(f"{node.name}: {node.op} would give {list(shape)} for each image")
    return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


def pooled(size: int, window: int, stride: int, padding: int, dilation: int, *, ceil: bool) -> int:
    """The number of windows. With `ceil`, the last may reach beyond the padding, but not start there."""
    room = size + 2 * padding - dilation * (window - 1) - 1
    num = (room + stride - 1 if ceil else room) // stride + 1
    return num - 1 if ceil and (num - 1) * stride >= size + padding else num


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
        raise Refusal(f"{node.name}: {node.op} reads {len(node.inputs)} nodes")
    missing = allowed.keys() - node.attributes.keys() - set(OPTIONAL)
    wrong = [key for key, value in node.attributes.items() if key not in allowed or not allowed[key](value)]
    if missing or wrong:
        names = ", ".join(sorted({*missing, *wrong}))
        raise Refusal(f"{node.name}: {node.op} has missing or invalid attributes: {names}")


def _output(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """A node's output; refuses inputs and tensors that do not fit each other."""
    wrong = _misfit(node, inputs)
    if not wrong:
        try:
            return run(node, inputs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            wrong = one_line(error)
    of = f" of {list(node.tensors['weight'].shape)}" if "weight" in node.tensors else ""
    shapes = " and ".join(str(list(x.shape[1:])) for x in inputs[:3])
    raise Refusal(f"{node.name}: {node.op}{of} reads {shapes}: {wrong}")


def _misfit(node: Node, inputs: Sequence[Tensor]) -> str:
    """The fault of a node that PyTorch would broadcast rather than refuse; empty if there is none."""
    x = inputs[0]
    for key, value in node.attributes.items():
        if isinstance(value, list) and len(cast("list[Any]", value)) != x.dim() - 2:
            return f"{key} {value} is not for {x.dim() - 2} spatial dimensions"
    fitting: dict[str, tuple[Shape, ...]] = {}
    match node.op:
        case "normalize":
            fitting = dict.fromkeys(("offset", "scale"), ((x.shape[-1], 1, 1),))
        case "conv" | "linear":
            weight = node.tensors["weight"]
            if weight.dim() != (2 if node.op == "linear" else x.dim()):
                return "the numbers of dimensions differ"
            fitting = {"weight": (tuple(weight.shape),), "bias": ((len(weight),),)}
        case "affine":
            fitting = dict.fromkeys(("scale", "shift"), ((1,), (x.shape[1],)))
        case "global_pool" if x.dim() < 3:
            return "there are no spatial dimensions"
        case "add" | "mul" if len({other.dim() for other in inputs}) > 1:
            return "the numbers of dimensions differ"
        case _:
            pass
    for key, shapes in fitting.items():
        tensor = node.tensors[key]
        if tensor.dtype not in (torch.float32, torch.float64):
            return f"{key} is of {tensor.dtype}, not float32"
        if tuple(tensor.shape) not in shapes:
            return f"{key} is of shape {list(tensor.shape)}, not {list(shapes[-1])}"
    return ""
