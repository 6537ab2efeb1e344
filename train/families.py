"""Table 1 and its relatives: from a spec to a net whose layers have names, and the values that it starts from."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from common.refusal import Refusal
from common.spec import ORDINARY, Spec
from train.layers import DiracConv1d, DiracConv2d, DiracConv3d, NCReLU, Normalize, Residual, sequence
from train.recipes import Start

# Convolutions per group; those of ResNet-18 and -34, which have blocks of two (section 3.5).
IMAGENET_GROUPS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}
# The parameter counts that Table 3 prints for 34 layers (15.5M, 34.8M) are those of a last group of five
# blocks, where ResNet-34 has three.
TABLE3_GROUPS = {34: (6, 8, 12, 10)}
# The factor by which each family shrinks an image before the last pool.
REDUCTION = {"cifar": 4, "pooled": 8, "imagenet": 32, "imagenet-table3": 32, "wrn": 4}


def build(spec: Spec) -> nn.Sequential:
    """The net of `spec`: images uint8 [N, H, W, C] → logits [N, K].

    cifar: Table 1 with what it omits, batch normalisation after every convolution and ReLU after the stem's.
    pooled: the same with a 2x2 max-pool after the stem, a quarter of the work, for machines without a GPU.
    imagenet: 18 or 34 layers, a 7x7/2 stem without activation and four groups (section 3.5).
    imagenet-table3: 34 layers, five blocks in the last group.
    wrn: Wide ResNet, the paper's residual reference, Dirac-free unless the parameterization says otherwise.

    Refuses depths, widths, parameterizations and image sizes that a family does not have.
    """
    groups, image, at_width_one = _groups(spec), spec.image, 64 if spec.family.startswith("imagenet") else 16
    base = int(at_width_one * spec.width)  # channels of the first group
    if base < 1:
        raise Refusal(f"width must be at least 1/{at_width_one} (one channel in the first group), got {spec.width:g}")
    if min(image.height, image.width) < (smallest := REDUCTION[spec.family]):
        raise Refusal(f"images must be at least {smallest}x{smallest} pixels, got {image.height}x{image.width}")
    _refuse_combinations(spec)
    is_residual, num_in = spec.family == "wrn", 16 if spec.family == "wrn" else base
    layers = {"normalize": Normalize(image.mean, image.std), "stem": _stem(spec, num_in)}
    for group, num_layers in enumerate(groups):
        num_out = base * 2**group
        if is_residual:
            layers[f"group{group}"] = _residual_group(num_in, num_out, num_layers, spec, stride=2 if group else 1)
        else:
            layers |= {f"pool{group}": nn.MaxPool2d(2)} if group else {}
            layers[f"group{group}"] = _plain_group(num_in, num_out, num_layers, spec)
        num_in = num_out
    if is_residual:
        layers["bn"] = nn.BatchNorm2d(num_in)
    if is_residual or spec.parameterization in ("per-output-b", "per-channel"):
        layers["relu"] = nn.ReLU()
    fc = nn.Linear(num_in, len(spec.labels))
    return sequence(**layers, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=fc)


def outline(spec: Spec) -> nn.Sequential:
    """The net of `spec` on the meta device: shapes without numbers."""
    with torch.device("meta"), _Unfilled():
        return build(spec)


def count_parameters(net: nn.Module) -> int:
    """Trainable numbers of a net: W, a, b, batch normalisation's γ and β, the classifier."""
    return sum(parameter.numel() for parameter in net.parameters())


class _Unfilled(TorchFunctionMode):
    """Leaves initial values out: to fill what has no memory, PyTorch imports its compiler, a second's work."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, module = kwargs or {}, getattr(function, "__module__", None)  # a tensor's method has none
        return kwargs["tensor"] if module == "torch.nn.init" else function(*args, **kwargs)


def _groups(spec: Spec) -> tuple[int, ...]:
    if spec.family not in REDUCTION:
        raise Refusal(f"family must be one of {', '.join(REDUCTION)}, got {spec.family}")
    if spec.family.startswith("imagenet"):
        groups = IMAGENET_GROUPS if spec.family == "imagenet" else TABLE3_GROUPS
        if spec.depth not in groups:
            raise Refusal(f"depth must be {' or '.join(map(str, groups))} for {spec.family}, got {spec.depth}")
        return groups[spec.depth]
    if spec.depth < 10 or spec.depth % 6 != 4:
        raise Refusal(f"depth must be 6N + 4 (10, 16, 22, 28, 34, ...), got {spec.depth}")
    return ((spec.depth - 4) // 3,) * 3


def _refuse_combinations(spec: Spec) -> None:
    if spec.parameterization == "per-channel" and spec.nonlinearity != "relu":
        raise Refusal("per-channel a and b require nonlinearity relu, as in the authors' second release")
    if spec.parameterization == "per-output-b" and spec.nonlinearity != "ncrelu":
        raise Refusal("a b for each output requires nonlinearity ncrelu, as in the authors' first published net")
    if spec.family == "wrn" and not (spec.nonlinearity == "relu" and spec.parameterization in ("plain", "delta")):
        raise Refusal("family wrn requires nonlinearity relu and parameterization plain or delta (eq. 14)")


def _stem(spec: Spec, num_out: int) -> nn.Sequential:
    num_in = spec.image.channels
    if spec.family.startswith("imagenet"):
        conv = nn.Conv2d(num_in, num_out, 7, stride=2, padding=3, bias=False)
        return sequence(conv=conv, bn=nn.BatchNorm2d(num_out), pool=nn.MaxPool2d(3, stride=2, padding=1))
    conv = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
    if spec.family == "wrn":  # its blocks begin with normalisation and ReLU
        return sequence(conv=conv)
    pool = {"pool": nn.MaxPool2d(2)} if spec.family == "pooled" else {}
    return sequence(conv=conv, bn=nn.BatchNorm2d(num_out), relu=nn.ReLU(), **pool)


def _plain_group(num_in: int, num_out: int, num_layers: int, spec: Spec) -> nn.Sequential:
    """Convolutions in a chain; the max-pool before the group lowers the resolution."""
    group, ncrelu = nn.Sequential(), spec.nonlinearity == "ncrelu"
    for layer in range(num_layers):
        conv = _convolution(2 * num_in if ncrelu else num_in, num_out, spec)
        first = {spec.nonlinearity: NCReLU(dims=2) if ncrelu else nn.ReLU()}
        group.add_module(f"block{layer}", sequence(**first, conv=conv, bn=nn.BatchNorm2d(num_out)))
        num_in = num_out
    return group


def _residual_group(num_in: int, num_out: int, num_layers: int, spec: Spec, *, stride: int) -> nn.Sequential:
    """Blocks of two convolutions with normalisation and ReLU before each, as Wide ResNet."""
    group = nn.Sequential()
    for index in range(num_layers // 2):
        stride = 1 if index else stride
        before = {"bn0": nn.BatchNorm2d(num_in), "relu0": nn.ReLU()}
        conv0, conv1 = _convolution(num_in, num_out, spec, stride=stride), _convolution(num_out, num_out, spec)
        body = sequence(conv0=conv0, bn1=nn.BatchNorm2d(num_out), relu1=nn.ReLU(), conv1=conv1)
        shortcut = nn.Sequential()
        if (num_in, stride) == (num_out, 1):
            block = sequence(sum=Residual(sequence(**before, **dict(body.named_children())), shortcut))
        else:  # where the shape changes, the shortcut reads the normalised activations too
            if stride > 1:  # of windows of one pixel: PyTorch 2.14's gradient of a 1x1 convolution with a stride
                # writes out of bounds (channels last, one thread, AVX2 without AVX-512); the fold joins the two again
                shortcut.add_module("subsample", nn.AvgPool2d(1, stride))
            shortcut.add_module("conv", nn.Conv2d(num_in, num_out, 1, bias=False))
            block = sequence(**before, sum=Residual(body, shortcut))
        group.add_module(f"block{index}", block)
        num_in = num_out
    return group


def _convolution(num_in: int, num_out: int, spec: Spec, *, stride: int = 1) -> nn.Conv2d:
    if spec.parameterization in ORDINARY:
        return nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False)
    kind, delta_form = spec.parameterization, spec.delta
    return DiracConv2d(num_in, num_out, 3, stride=stride, padding=1, parameterization=kind, delta_form=delta_form)


def initialized(spec: Spec, *, a: float, b: float, std: float, start: Start = "pytorch") -> nn.Sequential:
    """The net of `spec` before its first step; the numbers are drawn from torch's generator.

    Ordinary convolutions that are "initialised" get the filters a δ + b W_norm (eq. 4) of a Dirac net that is started
    here: with one seed both are the same function. What follows differs: a step moves the filters themselves.
    """
    if spec.parameterization != "initialised":
        net = build(spec)
        initialize(net, a=a, b=b, std=std, start=start)
        return net
    dirac = initialized(replace(spec, parameterization="dirac"), a=a, b=b, std=std, start=start)
    layers = {name: layer for name, layer in dirac.named_modules() if isinstance(layer, DiracConv2d)}
    filters = {f"{name}.weight": layer.folded_weight().detach() for name, layer in layers.items()}
    net = build(spec)
    started = dirac.state_dict() | filters
    net.load_state_dict({name: started[name] for name in net.state_dict()})
    return net


@torch.no_grad()
def initialize(net: nn.Module, *, a: float, b: float, std: float, start: Start = "pytorch") -> None:
    """W ~ N(0, std²) and the given `a` and `b` in Dirac convolutions (section 2); He's normal in the others.

    A `start` as the authors' code has it gives the classifier He's normal and a bias of 0, and batch normalisation a γ
    uniform in [0, 1]; otherwise both stay as PyTorch starts them. W's scale leaves Ŵ of eq. 4 as it is, but the
    gradient of W is inverse to it: a small `std` lets W turn fast from the first step on.
    """
    for layer in net.modules():
        match layer:
            case DiracConv1d() | DiracConv2d() | DiracConv3d():
                nn.init.normal_(layer.weight, std=std)
                if isinstance(layer.a, nn.Parameter):
                    layer.a.fill_(a)
                if layer.b is not None:
                    layer.b.fill_(b)
            case nn.Conv2d():
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            case nn.Linear() if start == "authors":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
            case nn.BatchNorm2d() if start == "authors":
                nn.init.uniform_(layer.weight)
