"""The algebra of the fold: for each rule its pattern, its equation, and what prevents it.

W ⊙ x is a convolution with zeros around x; s and t have a value per channel. A rule returns nodes in place of others,
the reason why it may not, or None where its pattern does not match. `simplify` applies all rules until none applies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from fold.linear import Linear, added, average_pool, chained, of_node, per_channel, to_node
from fold.nodes import Graph, Node, needed


@dataclass(frozen=True)
class Rewrite:
    """`nodes` replace the node `old` and those whose names they have; without any, readers of `old` read `source`.

    `bypass` names what the readers of further nodes read instead. Nodes that nothing reads any more are dropped.
    """

    old: str
    nodes: tuple[Node, ...] = ()
    source: str = ""
    bypass: Mapping[str, str] = field(default_factory=dict[str, str])


# A string says what prevents the rule, None that its pattern does not match.
Outcome = Rewrite | str | None
LINEAR = ("conv", "linear")
# These keep each channel's sign and place.
KEEP_CHANNELS = ("max_pool", "avg_pool", "global_pool", "flatten", "relu")


def simplify(graph: Graph) -> Graph:
    """All rules applied to a fixed point. It ends, because each application leaves fewer nodes or fewer numbers."""
    while (after := _step(graph)) is not None:
        graph = after
    outcomes = ((node, rule(graph, node)) for node in graph.nodes for rule in RULES)
    reasons = dict.fromkeys(f"{node.name}: {found}" for node, found in outcomes if isinstance(found, str))
    return replace(_with_convolutions(graph), blocked=tuple(reasons))


def _step(graph: Graph) -> Graph | None:
    """One pass over the nodes with the first rewrite of each; None if nothing is left to do."""
    before = graph
    for name in [node.name for node in graph.nodes]:
        if name not in {node.name for node in graph.nodes}:
            continue
        outcomes = (rule(graph, graph[name]) for rule in RULES)
        rewrite = next((outcome for outcome in outcomes if isinstance(outcome, Rewrite)), None)
        graph = _apply(graph, rewrite) if rewrite else graph
    return None if graph is before else graph


def _apply(graph: Graph, rewrite: Rewrite) -> Graph:
    target = rewrite.nodes[-1].name if rewrite.nodes else rewrite.source
    instead = {**rewrite.bypass, rewrite.old: target}
    taken_in = {node.name for node in rewrite.nodes}
    nodes: list[Node] = []
    for node in graph.nodes:
        parts = rewrite.nodes if node.name == rewrite.old else () if node.name in taken_in else (node,)
        nodes += [part.reading(instead) for part in parts]
    last = graph.nodes[-1].name
    return replace(graph, nodes=needed(nodes, instead.get(last, last)))


def affine_of_affine(graph: Graph, node: Node) -> Outcome:
    """s2 (s1 x + t1) + t2 = (s2 s1) x + (s2 t1 + t2)."""
    first = _before(graph, node, ("affine",), ("affine",))
    if not isinstance(first, Node):
        return first
    (s1, t1), (s2, t2) = (_scale_shift(part) for part in (first, node))
    return Rewrite(node.name, (replace(node, inputs=first.inputs, tensors={"scale": s2 * s1, "shift": s2 * t1 + t2}),))


def affine_after_linear(graph: Graph, node: Node) -> Outcome:
    """s (W ⊙ x + c) + t = (s W) ⊙ x + (s c + t), for batch norm and scaling after a convolution or a matrix."""
    before = _before(graph, node, ("affine",), LINEAR)
    if not isinstance(before, Node):
        return before
    if before.op == "linear" and graph.ranks[before.name] != 2:
        return _not_merged(before, "its channels are not known to be the matrix's rows")
    weight, bias = before.tensors["weight"], before.tensors["bias"]
    if not weight.is_meta:
        scale, shift = _scale_shift(node)
        weight, bias = scale.view(-1, *[1] * (weight.dim() - 1)) * weight, scale * bias + shift
    return Rewrite(node.name, (replace(before, tensors={"weight": weight, "bias": bias}, equals=node.origin),))


def affine_before_linear(graph: Graph, node: Node) -> Outcome:
    """W ⊙ (s x + t) + c = (W s) ⊙ x + (Σ W t + c), unless zeros are padded beside t."""
    before = _before(graph, node, LINEAR, ("affine",))
    if not isinstance(before, Node):
        return before
    if node.op == "linear" and graph.ranks[before.name] != 2:
        return _not_merged(before, "its channels are not known to be the matrix's columns")
    scale, shift = _scale_shift(before)
    if not scale.is_meta and shift.any() and any(map(any, node.attributes.get("padding", ()))):
        return _not_merged(before, "its shift is missing in the zeros that are padded")
    weight, bias = node.tensors["weight"], node.tensors["bias"]
    if not weight.is_meta:
        groups, num_in = node.attributes.get("groups", 1), weight.shape[1]
        # [G, 1, N_i / G, 1...] beside filters [G, N_o / G, N_i / G, ...]
        filters = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
        shape = (groups, 1, num_in, *[1] * (weight.dim() - 2))
        s, t = (part.expand(num_in * groups).reshape(shape) for part in (scale, shift))
        bias = bias + (filters * t).flatten(2).sum(2).flatten()
        weight = (filters * s).reshape(weight.shape)
    return Rewrite(node.name, (replace(node, inputs=before.inputs, tensors={"weight": weight, "bias": bias}),))


def pad_before_convolution(graph: Graph, node: Node) -> Outcome:
    """Zeros around x, then a convolution that pads zeros = a convolution that pads both."""
    if node.op != "conv" or (before := graph[node.inputs[0]]).op != "pad":
        return None
    pairs = zip(node.attributes["padding"], before.attributes["padding"], strict=True)
    padding = [[a + b for a, b in zip(own, added, strict=True)] for own, added in pairs]
    attributes = {**node.attributes, "padding": padding}
    return Rewrite(node.name, (replace(node, inputs=before.inputs, attributes=attributes),))


def subsampling_before_point(graph: Graph, node: Node) -> Outcome:
    """W ⊙ x(s i) = the 1x1 convolution of stride s, because a pool of one-pixel windows only leaves out pixels."""
    if node.op != "conv" or (before := graph[node.inputs[0]]).op not in ("max_pool", "avg_pool"):
        return None
    how, pool = node.attributes, before.attributes
    one_pixel = prod(pool["size"]) == 1 and not any(pool["padding"])
    if not one_pixel or prod(node.tensors["weight"].shape[2:]) != 1 or any(map(any, how["padding"])):
        return None
    stride = [own * left for own, left in zip(how["stride"], pool["stride"], strict=True)]
    return Rewrite(node.name, (replace(node, inputs=before.inputs, attributes={**how, "stride": stride}),))


def flat_sum(graph: Graph, node: Node) -> Outcome:
    """(x + y) + z = x + y + z, so that `sum_of_linear` sees every pair of terms."""
    inner = [name for name in node.inputs if graph[name].op == "add" and _has_one_reader(graph, name)]
    if node.op != "add" or not inner:
        return None
    terms = [term for name in node.inputs for term in (graph[name].inputs if name in inner else (name,))]
    return Rewrite(node.name, (replace(node, inputs=tuple(terms)),))


def sum_of_linear(graph: Graph, node: Node) -> Outcome:
    """W1 ⊙ x + W2 ⊙ x = (W1 + W2) ⊙ x; smaller kernels get zeros around them, groups become common ones.

    A term is a convolution of x, an affine map (1x1, depthwise), an average pool (all taps equal), or x itself.
    """
    if node.op != "add":
        return None
    blocked: list[str] = []
    for pair in combinations(range(len(node.inputs)), 2):
        maps = _maps_of_one_source(graph, *(graph[node.inputs[index]] for index in pair))
        if maps is None:
            continue
        merged = added(*maps)
        rest = tuple(name for index, name in enumerate(node.inputs) if index not in pair)
        if isinstance(merged, str):
            blocked.append(f"{' and '.join(node.inputs[index] for index in pair)} not merged: {merged}")
        elif not rest:
            return Rewrite(node.name, (to_node(merged, equals=node.origin),))
        elif merged.name not in rest:  # the sum takes the name of a term, which must not be added once more
            partial = to_node(merged, equals="-")  # no node of the traced graph has this output
            return Rewrite(node.name, (partial, replace(node, inputs=(partial.name, *rest))))
    return "; ".join(blocked) or None


def _maps_of_one_source(graph: Graph, one: Node, other: Node) -> tuple[Linear, Linear] | None:
    """Both terms as maps of one source: what both read, or one of the terms; None where there is no such source."""
    maps = [_map(graph, node) for node in (one, other)]
    for own, beside in ((maps[0], other), (maps[1], one)):
        if own and own.source == beside.name and own.num_in:
            ones = torch.ones(1, dtype=own.weight.dtype)
            return own, per_channel(beside.name, beside.name, ones, torch.zeros_like(ones), len(own.kernel))
    if maps[0] and maps[1] and maps[0].source == maps[1].source and (maps[0].num_in or maps[1].num_in):
        return maps[0], maps[1]
    return None


def _map(graph: Graph, node: Node) -> Linear | None:
    """A term as a linear map of what it reads; None where it is not linear, or where others read it too."""
    rank = graph.ranks[node.name]
    if not _has_one_reader(graph, node.name):
        return None
    match node.op:
        case "conv" | "linear" if node.op == "conv" or rank == 2:
            return of_node(node)
        case "affine" if rank is not None:
            return per_channel(node.inputs[0], node.name, *_scale_shift(node), rank - 2)
        case "avg_pool" if not node.attributes["ceil"]:
            counts_all = node.attributes["count_padding"] or not any(node.attributes["padding"])
            return average_pool(node) if counts_all else None
        case _:
            return None


def linear_of_linear(graph: Graph, node: Node) -> Outcome:
    """W2 ⊙ (W1 ⊙ x + c1) + c2 = (W2 W1) ⊙ x + (Σ W2 c1 + c2), where one of the kernels is 1x1."""
    before = _before(graph, node, LINEAR, (node.op,))
    if not isinstance(before, Node):
        return before
    merged = chained(of_node(before), of_node(node))
    if isinstance(merged, str):
        return _not_merged(before, merged)
    return Rewrite(node.name, (to_node(merged, equals=node.origin),))


def relu_of_nonnegative(graph: Graph, node: Node) -> Outcome:
    """ρ(x) = x where x ≥ 0."""
    if node.op == "relu" and is_nonnegative(graph, node.inputs[0]):
        return Rewrite(node.name, source=node.inputs[0])
    return None


def zero_half(graph: Graph, node: Node) -> Outcome:
    """[W1 W2] ⊙ NCReLU(x) = W1 ⊙ x where x ≥ 0: min(x, 0) is zero, through pools as well (eq. 9, 10)."""
    if node.op not in LINEAR or (node.op == "linear" and graph.ranks[node.name] != 2):  # whose columns are channels
        return None
    above = node.inputs[0]
    while graph[above].op in KEEP_CHANNELS and _has_one_reader(graph, above):
        above = graph[above].inputs[0]
    ncrelu = graph[above]
    if ncrelu.op != "ncrelu" or not is_nonnegative(graph, ncrelu.inputs[0]):
        return None
    if not _has_one_reader(graph, above):
        return f"half of {above} is zero and stays: {len(graph.readers(above))} nodes read it"
    if node.attributes.get("groups", 1) != 1:
        return f"half of {above} is zero and stays: the convolution has groups"
    weight = node.tensors["weight"]
    tensors = {**node.tensors, "weight": weight[:, : weight.shape[1] // 2]}
    return Rewrite(node.name, (replace(node, tensors=tensors),), bypass={above: ncrelu.inputs[0]})


def no_operation(graph: Graph, node: Node) -> Outcome:
    """1 x + 0 = x."""
    if node.op != "affine" or node.tensors["scale"].is_meta:
        return None
    scale, shift = _scale_shift(node)
    return None if (scale != 1).any() or shift.any() else Rewrite(node.name, source=node.inputs[0])


def depthwise_point(graph: Graph, node: Node) -> Outcome:
    """A depthwise 1x1 convolution is s x + t."""
    if node.op != "conv":
        return None
    weight, how = node.tensors["weight"], node.attributes
    is_point = prod(weight.shape[1:]) == 1 and how["groups"] == len(weight)
    if weight.is_meta or not is_point or prod(how["stride"]) != 1 or any(map(any, how["padding"])):
        return None
    tensors = {"scale": weight.flatten(), "shift": node.tensors["bias"]}
    return Rewrite(node.name, (replace(node, op="affine", attributes={}, tensors=tensors),))


RULES: Sequence[Callable[[Graph, Node], Outcome]] = (
    no_operation,
    relu_of_nonnegative,
    depthwise_point,
    zero_half,
    affine_of_affine,
    affine_after_linear,
    pad_before_convolution,
    subsampling_before_point,
    affine_before_linear,
    flat_sum,
    sum_of_linear,
    linear_of_linear,
)


def is_nonnegative(graph: Graph, name: str) -> bool:
    """Whether a node's operation rules out values below zero."""
    node = graph[name]
    match node.op:
        case "relu" | "sigmoid" | "hardsigmoid":
            return True
        case "clip":
            return node.attributes["low"] >= 0
        case "max_pool" | "avg_pool" | "global_pool" | "flatten" | "slice":
            return is_nonnegative(graph, node.inputs[0])
        case _:
            return False


def _has_one_reader(graph: Graph, name: str) -> bool:
    return len(graph.readers(name)) == 1


def _before(graph: Graph, node: Node, ops: Sequence[str], before: Sequence[str]) -> Node | str | None:
    """The node that a node of one of `ops` reads, if it is one of `before` and has no other reader."""
    if node.op not in ops or (found := graph[node.inputs[0]]).op not in before:
        return None
    if _has_one_reader(graph, found.name):
        return found
    return _not_merged(found, f"{len(graph.readers(found.name))} nodes read it")


def _not_merged(before: Node, reason: str) -> str:
    return f"not merged with {before.name}: {reason}"


def _scale_shift(node: Node) -> tuple[Tensor, Tensor]:
    return node.tensors["scale"], node.tensors["shift"]


def _with_convolutions(graph: Graph) -> Graph:
    """The remaining affine maps of images as depthwise convolutions, which runtimes support best."""
    nodes = list(graph.nodes)
    for index, node in enumerate(nodes):
        rank = graph.ranks[node.name]
        if node.op == "affine" and len(node.tensors["scale"]) > 1 and rank is not None and rank > 2:
            linear = per_channel(node.inputs[0], node.name, *_scale_shift(node), rank - 2)
            nodes[index] = to_node(linear, equals=node.equals)
    return replace(graph, nodes=tuple(nodes))
