"""Where training starts: the values of every weight before the first step."""

import torch
from torch import nn

from train.layers import DiracConv1d, DiracConv2d, DiracConv3d
from train.recipes import Start


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
