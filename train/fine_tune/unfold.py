"""A plain net opened again: filters V as s (a δ + b W_norm), biases as batch normalisation. The inverse of the fold.

A fold gives V = s Ŵ for every filter, where s is what batch normalisation scales it by; from V alone neither s nor
a, b and W can be told, and every choice gives the same net. Here `a` is where training starts it, and per filter

    t = 1 / s,  W = t V - a δ,  b = ‖W‖.

`b` is one number for a layer in eq. 4, so there t is a root of ‖t V - a δ‖ = b:  v² t² - 2 a d t + a² n - b² = 0
with v = ‖V‖, d = ⟨V, δ⟩ and n = ‖δ‖². It is real where b ≥ a √n sin θ, θ the angle between V and δ.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from common.refusal import Refusal, first_of
from common.spec import Spec
from train.checkpoint import misfits
from train.families import build, initialize
from train.layers import DiracConv2d, NCReLU

# b is this multiple of the smallest b that all filters of a layer allow. At the smallest, the two roots of the worst
# filter meet, and a filter orthogonal to δ would need an unbounded s.
ABOVE_SMALLEST = 1.25
# δ takes its least-squares share where |cos θ| is at least this; where δ is nearly absent W takes part of it.
LEAST_COSINE = 0.5
PLAIN_NORM = 2**0.5  # of a filter of an ordinary convolution: He's start, for any fan-in


@dataclass(frozen=True)
class Part:
    """A convolution and what its fold takes in, by name; or a batch normalisation that the fold leaves alone."""

    name: str
    layer: nn.Module
    norm: str | None = None  # the batch normalisation right after it
    halved: str | None = None  # the NCReLU before it whose negative half is always zero

    def shape(self) -> tuple[int, ...]:
        """Of the plain filters; batch normalisation alone becomes a depthwise convolution."""
        if not isinstance(self.layer, nn.Conv2d):
            return len(self.layer.get_parameter("weight")), 1, 1, 1
        num_out, num_in, *kernel = self.layer.weight.shape
        return (num_out, num_in // 2 if self.halved else num_in, *kernel)


@torch.no_grad()
def unfold(weights: Mapping[str, Tensor], spec: Spec, *, a: float, b: float, std: float) -> nn.Sequential:
    """A net of `spec`, float64 and in evaluation mode, whose fold has the tensors `weights` of a plain file.

    `a`, `b` and `std`, W's deviation, are what training starts from: the first stays, b / a is the least that is left
    to W, and the last gives W its norm. Batch statistics are 0 and 1: see `measure` in train/fine_tune/from_plain.py.
    Refuses tensors that are not those of the spec.
    """
    if not 0 < a < float("inf") or not std > 0:
        raise Refusal(f"a plain file is opened with --a0 and --w-std above 0, got {a:g} and {std:g}")
    net = build(spec)
    initialize(net, a=a, b=b, std=std)
    net = net.double().eval()
    parts = list(parts_of(net))
    _refuse_misfit(weights, net, parts, spec)
    for part in parts:
        filters, bias = (weights[f"{part.name}.{kind}"].double() for kind in ("weight", "bias"))
        scale = filters.flatten()
        if isinstance(part.layer, nn.Conv2d):
            scale = _open(part, filters, std=std, least=b / a)
        norm = net.get_submodule(part.norm or part.name)
        if isinstance(norm, nn.BatchNorm2d):  # s x + c, with a mean of 0 and a variance of 1
            norm.weight.copy_(scale * (1 + norm.eps) ** 0.5)
            norm.bias.copy_(bias)
    net.get_submodule("fc").load_state_dict({kind: weights[f"fc.{kind}"] for kind in ("weight", "bias")})
    return net


@torch.no_grad()
def as_plain(net: nn.Sequential, weights: Mapping[str, Tensor]) -> nn.Sequential:
    """The plain net of the same tensors with the layers of `net`, float64: the reference for the opened net."""
    plain = deepcopy(net)
    for part in parts_of(net):
        filters, bias = (weights[f"{part.name}.{kind}"].double() for kind in ("weight", "bias"))
        conv, (num_out, per_group, size, _) = part.layer, filters.shape
        how: dict[str, Any] = {"groups": num_out}
        if isinstance(conv, nn.Conv2d):
            how = {"stride": conv.stride, "padding": conv.padding}
        convolution = nn.Conv2d(per_group * how.get("groups", 1), num_out, size, **how)
        convolution.weight, convolution.bias = nn.Parameter(filters), nn.Parameter(bias)
        plain.set_submodule(part.name, convolution)
        if part.norm:
            plain.set_submodule(part.norm, nn.Identity())
        if part.halved:
            plain.set_submodule(part.halved, nn.ReLU())
    return plain.eval()


def parts_of(net: nn.Module) -> Iterator[Part]:
    """The layers of `net` that have filters in its plain file, in the order in which they run."""
    part, rectified, halved = None, False, None
    for name, layer in net.named_modules():
        is_norm = isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm)
        if part and is_norm and part.norm is None and _residual(name) == _residual(part.name):
            part = replace(part, norm=name)
            continue
        if part and not isinstance(layer, nn.Sequential):
            yield part
            part = None
        match layer:
            case nn.Conv2d():
                part, rectified, halved = Part(name, layer, halved=halved), False, None
            case nn.BatchNorm2d() | nn.SyncBatchNorm():
                yield Part(name, layer)
            case nn.ReLU():
                rectified = True
            case NCReLU():
                halved = name if rectified else None
    if part:
        yield part


def _residual(name: str) -> str:
    """The sum inside which a layer is; empty for none."""
    return name.rpartition(".sum.")[0]


def _refuse_misfit(weights: Mapping[str, Tensor], net: nn.Sequential, parts: list[Part], spec: Spec) -> None:
    shapes = {f"fc.{kind}": tuple(net.get_submodule("fc").get_parameter(kind).shape) for kind in ("weight", "bias")}
    for part in parts:
        shape = part.shape()
        shapes |= {f"{part.name}.weight": shape, f"{part.name}.bias": shape[:1]}
    bare = [f"{part.name}.bias" for part in parts if isinstance(part.layer, nn.Conv2d) and part.norm is None]
    if wrong := misfits(weights, shapes) or [f"{name} must be zero" for name in bare if weights[name].any()]:
        raise Refusal(f"the plain file does not fit its spec {spec.name}: {first_of(wrong)}")


def _open(part: Part, filters: Tensor, *, std: float, least: float) -> Tensor:
    """Write V into a convolution's a, b and W; gives s for each filter, 0 for a filter of zeros.

    The columns that read the negative half before a halved NCReLU get no W: only zeros arrive there.
    """
    conv = part.layer
    assert isinstance(conv, nn.Conv2d)
    alive, num_read = filters.flatten(1).any(dim=1), filters.shape[1]
    if part.norm is None:  # nothing scales the filter afterwards
        conv.weight.copy_(filters - conv.a * conv.delta if isinstance(conv, DiracConv2d) else filters)
        return torch.ones(len(filters))
    if isinstance(conv, DiracConv2d):
        inverse, opened = _open_dirac(conv, filters, std=std, least=least)
    else:
        inverse = PLAIN_NORM / _norm(filters)
        opened = _per_filter(inverse) * filters
    conv.weight[:, num_read:] = 0
    # Where b is 0, W keeps its start: from a W of 0 no gradient would lead away.
    given = alive & opened.flatten(1).any(dim=1) if getattr(conv, "b", None) is not None else alive
    conv.weight[given, :num_read] = opened[given]
    return torch.where(alive, 1 / inverse, 0.0)


def _open_dirac(conv: DiracConv2d, filters: Tensor, *, std: float, least: float) -> tuple[Tensor, Tensor]:
    """(t, W) for each filter; sets `a` and `b` where the form has one for each, and `b` of a layer."""
    alive, v, delta = filters.flatten(1).any(dim=1), _norm(filters), conv.delta[:, : filters.shape[1]]
    n, d = (part.sum(dim=(1, 2, 3)) for part in (delta, filters * delta))
    root_n, sign = n.sqrt(), torch.where(d < 0, -1.0, 1.0)
    cosine = torch.where(n > 0, d / (root_n * v), 0.0)
    a = conv.a.expand(len(filters)).clone()
    size = a * root_n.clamp_min(1)  # ‖a δ‖, or that of a δ with a single one
    if conv.a.dim():  # an a and a b for each filter: δ has its least-squares share
        inverse = size / v
        a = torch.where(alive & (n > 0), inverse * d / n.clamp_min(1), a)
    elif conv.b is not None and not conv.b.dim():
        sine = (1 - cosine**2).clamp_min(0).sqrt()
        b = a * torch.where(alive, ABOVE_SMALLEST * root_n * sine, 0.0).max().clamp_min(least)
        inverse = a * (d + sign * (d**2 - v**2 * (n - (b / a) ** 2)).clamp_min(0).sqrt()) / v**2
        conv.b.copy_(b[0])
    else:
        inverse = sign * size / (v * cosine.abs().clamp_min(LEAST_COSINE))
    opened = _per_filter(inverse) * filters - _per_filter(a) * delta
    if conv.a.dim():
        conv.a.copy_(a)
    if conv.b is None:
        return inverse, opened
    norm = opened.flatten(1).norm(dim=1)
    if conv.b.dim():
        conv.b.copy_(torch.where(alive, norm, conv.b))
    # Its norm changes nothing but how fast it turns: that of the start.
    start = std * conv.weight[0].numel() ** 0.5
    return inverse, opened * _per_filter(start / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def _norm(filters: Tensor) -> Tensor:
    """[N_o], 1 for a filter of zeros."""
    norm = filters.flatten(1).norm(dim=1)
    return torch.where(norm > 0, norm, 1.0)


def _per_filter(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
