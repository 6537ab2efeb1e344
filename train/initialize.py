"""Where training starts: the values of every weight before the first step."""

from dataclasses import replace

import torch
from torch import nn

from common.spec import Spec
from train.families import build
from train.layers import DiracConv1d, DiracConv2d, DiracConv3d
from train.recipes import Start


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
    filters = {
        f"{name}.weight": layer.folded_weight().detach()
        for name, layer in dirac.named_modules()
        if isinstance(layer, DiracConv2d)
    }
    net = build(spec)
    started = dirac.state_dict() | filters
    net.load_state_dict({name: started[name] for name in net.state_dict()})
    return net


@torch.no_grad()
def initialize(net: nn.Module, *, a: float, b: float, std: float, start: Start = "pytorch") -> None:
    """W ~ N(0, std²) and the given `a` and `b` in Dirac convolutions (section 2); He's normal in the others.

    A `start` as the authors' code has it gives the classifier He's normal and a bias of 0, and batch
    normalisation a γ uniform in [0, 1]; otherwise both stay as PyTorch starts them.
    W's scale leaves Ŵ of eq. 4 as it is, but the gradient of W is inverse to it: a small `std` lets W turn fast
    from the first step on.
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
