"""Nets of other papers beside which a plain DiracNet is measured: folded, of random weights, exported the same way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from bench.nets import random_net
from common.spec import Spec
from fold.plain import fold_net
from train.layers import Normalize, Residual

A0_BLOCKS, A0_WIDTHS = (1, 2, 4, 14, 1), (48, 48, 96, 192, 1280)


@dataclass(frozen=True)
class Peer:
    """`make` takes the spec of the DiracNet, for images and labels."""

    published: str
    make: Callable[[Spec], nn.Sequential]


def wide_resnet(depth: int, width: float, spec: Spec) -> nn.Sequential:
    """Pre-activation blocks: the batch normalisation at their start folds into one weight for each channel."""
    settings = replace(spec, family="wrn", depth=depth, width=width, nonlinearity="relu", parameterization="plain")
    return fold_net(random_net(settings)).float()


def resnet18(spec: Spec) -> nn.Sequential:
    """Four groups of two blocks of two convolutions, each with the batch normalisation after it folded in."""
    net = _start(spec)
    net.append(_convolution(spec.image.channels, 64, size=7, stride=2)).append(nn.ReLU()).append(nn.MaxPool2d(3, 2, 1))
    num_in = 64
    for num_out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for block_stride in (stride, 1):
            body = (_convolution(num_in, num_out, stride=block_stride), nn.ReLU(), _convolution(num_out, num_out))
            shortcut = [] if num_in == num_out else [_convolution(num_in, num_out, size=1, stride=block_stride)]
            net.append(Residual(nn.Sequential(*body), nn.Sequential(*shortcut))).append(nn.ReLU())
            num_in = num_out
    return _finish(net, num_in, spec)


def repvgg(widths: Sequence[int], strides: Sequence[int], spec: Spec) -> nn.Sequential:
    """RepVGG's deployed form: 3x3 convolutions and ReLUs; a stage's first convolution has its stride."""
    net, num_in = _start(spec), spec.image.channels
    for num_blocks, num_out, stride in zip(A0_BLOCKS, widths, strides, strict=True):
        for block in range(num_blocks):
            net.append(_convolution(num_in, num_out, stride=1 if block else stride)).append(nn.ReLU())
            num_in = num_out
    return _finish(net, num_in, spec)


NOT_PUBLISHED = "none published: a chain of its stages without the strides of stem and first stage"
PEERS = {
    "WRN-40-2": Peer("5.33 % error on CIFAR-10 (arXiv 1605.07146, table 4)", partial(wide_resnet, 40, 2.0)),
    "WRN-16-1": Peer("8.77 % error on CIFAR-10 (arXiv 1612.03928, table 1)", partial(wide_resnet, 16, 1.0)),
    "ResNet-18": Peer("30.50 % top-1 error on ImageNet (arXiv 1706.00388, table 3)", resnet18),
    "RepVGG-A0": Peer(
        "27.59 % top-1 error on ImageNet (arXiv 2101.03697, table 4)", partial(repvgg, A0_WIDTHS, (2, 2, 2, 2, 2))
    ),
    "RepVGG-A0 at 32x32": Peer(NOT_PUBLISHED, partial(repvgg, A0_WIDTHS, (1, 1, 2, 2, 2))),
    "RepVGG-A0/3 at 32x32": Peer(
        NOT_PUBLISHED, partial(repvgg, tuple(width // 3 for width in A0_WIDTHS), (1, 1, 2, 2, 2))
    ),
}
# Of the DiracNets themselves: tables 2 and 3.
PUBLISHED = {
    "34-2": "5.6 % error on CIFAR-10 (table 2)",
    "16-1": "none published",
    "18-0.75": "32.30 % top-1 error on ImageNet (table 3)",
}


def _start(spec: Spec) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Normalize(spec.image.mean, spec.image.std))


def _finish(net: nn.Sequential, num_in: int, spec: Spec) -> nn.Sequential:
    net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(num_in, len(spec.labels)))
    return net.eval().requires_grad_(False)


def _convolution(num_in: int, num_out: int, *, size: int = 3, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(num_in, num_out, size, stride=stride, padding=size // 2)
    nn.init.kaiming_normal_(convolution.weight)  # or 22 layers would leave nothing of the images
    return convolution
