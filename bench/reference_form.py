"""A Dirac net as a user has it before this project: every weight made anew at each call, contiguous NCHW."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fold.plain import named_layers
from train.layers import DiracConv2d, NCReLU, Normalize


class ReferenceConv(nn.Module):
    """a δ + b W / ‖W‖ with a dense δ and an a and b for every filter, then the convolution."""

    def __init__(self, conv: DiracConv2d) -> None:
        super().__init__()
        per_filter = torch.ones(conv.out_channels)
        self.a = nn.Parameter(conv.a.detach() * per_filter)
        self.b = nn.Parameter(conv.b.detach() * per_filter)
        self.weight = nn.Parameter(conv.weight.detach().clone())
        self.register_buffer("delta", conv.delta.clone())
        self.padding = conv.padding

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(self.weight.view(len(self.weight), -1)).view_as(self.weight)
        weight = self.a.view(-1, 1, 1, 1) * self.delta + self.b.view(-1, 1, 1, 1) * unit
        return F.conv2d(x, weight, padding=self.padding)


class ReferenceNCReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), -(-x).relu()], dim=1)


class ContiguousNormalize(nn.Module):
    def __init__(self, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, images: Tensor) -> Tensor:
        return self.normalize(images).contiguous()


def reference_form(net: nn.Sequential) -> nn.Sequential:
    """The layers of a Dirac net one by one in that form, with the same weights."""
    return nn.Sequential(*(_reference_layer(layer) for _, layer in named_layers(net))).eval()


def _reference_layer(layer: nn.Module) -> nn.Module:
    match layer:
        case DiracConv2d():
            return ReferenceConv(layer)
        case NCReLU():
            return ReferenceNCReLU()
        case Normalize():
            return ContiguousNormalize(layer)
    return layer
