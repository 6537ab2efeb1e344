"""Multiply-accumulate operations, counted from a net."""

from copy import deepcopy
from math import prod

import torch
from torch import Tensor, nn

from common.spec import ImageSpec


def count_macs(net: nn.Module, image: ImageSpec) -> int:
    """Of one image in all convolutions and linear layers, each computed directly."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * prod(layer.weight.shape[1:])

    net = deepcopy(net).to("meta")
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    net(torch.empty((1, image.height, image.width, image.channels), dtype=torch.uint8, device="meta"))
    return total
