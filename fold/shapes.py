"""The shapes of a graph's outputs, inferred from its nodes: the check of a graph that comes from a file.

Attributes and sizes are checked before anything is computed, so that a small file cannot request much memory.
"""

from collections.abc import Sequence
from math import isfinite, prod
from typing import Any, cast

import torch
from torch import Tensor

from common.refusal import Refusal, one_line
from fold.nodes import Graph, Node, run

Shape = tuple[int, ...]  # of one image's output, without the batch: (C, H, W) or (K,)

MAX_NODES = 10_000
LARGEST_SIZE = 2**16  # of a window, a stride or a padding
LARGEST_WHOLE = 2**63  # of a number: PyTorch takes no larger one that is whole
MOST_VALUES = 2**28  # of one image's output: a gigabyte in float32


def infer_shapes(graph: Graph, image: Shape, *, most_values: float = MOST_VALUES) -> dict[str, Shape]:
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
        if min(shape, default=0) < 1 or prod(shape) > most_values:
            raise Refusal(f"{node.name}: {node.op} would give {list(shape)} for each image")
    return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


def pooled(size: int, window: int, stride: int, padding: int, dilation: int, *, ceil: bool) -> int:
    """The number of windows. With `ceil`, the last may reach beyond the padding, but not start there."""
    room = size + 2 * padding - dilation * (window - 1) - 1
    num = (room + stride - 1 if ceil else room) // stride + 1
    return num - 1 if ceil and (num - 1) * stride >= size + padding else num


def _is_end(value: Any) -> bool:
    """The end of a slice; a negative one counts from the last channel."""
    return type(value) is int and abs(value) <= LARGEST_SIZE


def _is_rank(value: Any) -> bool:
    return value is None or (type(value) is int and 2 <= value <= 5)


# The attributes of each operation, by example (see `_fits`) or with a test; those in OPTIONAL may be missing.
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "input": {"rank": _is_rank},
    "conv": {"stride": [1], "padding": [[0, 0]], "dilation": [1], "groups": 1},
    "affine": {"rank": _is_rank},
    "slice": {"start": _is_end, "stop": lambda value: value is None or _is_end(value)},  # pyright: ignore[reportUnknownLambdaType]
    "pad": {"padding": [[0, 0]]},
    "clip": {"low": 0.0, "high": 0.0},
    "leaky_relu": {"slope": 0.0},
    "gelu": {"approximate": lambda value: value in ("none", "tanh")},  # pyright: ignore[reportUnknownLambdaType]
    "max_pool": {"size": [1], "stride": [1], "padding": [0], "dilation": [1], "ceil": False},
    "avg_pool": {"size": [1], "stride": [1], "padding": [0], "ceil": False, "count_padding": False},
}
OPTIONAL = ("rank",)
NUM_INPUTS = {"input": (0, 0), "add": (2, MAX_NODES), "mul": (2, 2), "cat": (1, MAX_NODES)}  # others: one


def _fits(value: Any, like: Any) -> bool:
    """Whether a value is like its example: a bool, a finite number, an int that is no smaller, or a list of such."""
    match like:
        case bool():
            return type(value) is bool
        case int():
            return type(value) is int and like <= value <= LARGEST_SIZE
        case float():
            whole = type(value) is int and abs(value) < LARGEST_WHOLE
            return whole or (type(value) is float and isfinite(value))
        case [first, *rest]:
            parts = cast("list[Any]", value) if isinstance(value, list) else []
            return (len(parts) == 2 if rest else 1 <= len(parts) <= 3) and all(_fits(part, first) for part in parts)
        case _:
            return like(value)


def _check_attributes(node: Node) -> None:
    allowed = ATTRIBUTES.get(node.op, {})
    least, most = NUM_INPUTS.get(node.op, (1, 1))
    if not least <= len(node.inputs) <= most:
        raise Refusal(f"{node.name}: {node.op} reads {len(node.inputs)} nodes")
    missing = allowed.keys() - node.attributes.keys() - set(OPTIONAL)
    wrong = [key for key, value in node.attributes.items() if key not in allowed or not _fits(value, allowed[key])]
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
        if (tensor := node.tensors.get(key)) is None:  # the bias of a convolution that a lowering made
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            return f"{key} is of {tensor.dtype}, not float32"
        if tuple(tensor.shape) not in shapes:
            return f"{key} is of shape {list(tensor.shape)}, not {list(shapes[-1])}"
    return ""
