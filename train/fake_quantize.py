"""Training for eight bits: filters and activations rounded as the int8 export rounds them, gradients left alone.

What is rounded is the folded filter, with δ inside and batch normalisation taken in by its running statistics. These
stay as they are: a batch's own would make other filters of every batch, and none of them is exported.
"""

import torch
from torch import Tensor, nn

from train.layers import DiracConv2d
from train.unfold import Part, parts_of


class FakeQuantized(nn.Module):
    """A chain of layers as its int8 form computes it, in float32; the parameters are those of `net`.

    As export/integer.py has it: the stem and the classifier stay in float32, what the stem gives and what every other
    convolution gives is rounded to unsigned bytes, filters to signed ones. The range of an activation is that of the
    batch, so that there is nothing to remember; the export measures its own.
    """

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net
        self._parts = {part.name: part for part in parts_of(net)}
        stem = next(iter(self._parts))
        taken_in = {part.norm for part in self._parts.values()} | {part.halved for part in self._parts.values()}
        self._layers = [
            (name, layer)
            for name, layer in net.named_modules()
            if not isinstance(layer, nn.Sequential) and name not in taken_in
        ]
        rest = [name for name, _ in self._layers]
        rest = rest[rest.index(stem) + 1 :]
        float_too = (nn.ReLU, nn.MaxPool2d)
        self._start = next(name for name in rest if not isinstance(net.get_submodule(name), float_too))

    def forward(self, images: Tensor) -> Tensor:
        x, in_bytes = images, False
        for place, (name, layer) in enumerate(self._layers):
            if name == self._start:
                x, in_bytes = round_activations(x), True
            if not isinstance(layer, nn.Conv2d):
                x = layer(x)
                continue
            weight, bias = self._folded(self._parts[name])
            x = layer._conv_forward(x, round_filters(weight) if in_bytes else weight, bias)
            if in_bytes:
                x = round_activations(x, rectified=self._is_rectified(place))
        return x

    def _folded(self, part: Part) -> tuple[Tensor, Tensor]:
        """A convolution with the batch normalisation after it, by its running statistics."""
        conv = part.layer
        norm = self.net.get_submodule(part.norm or "")
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight = conv.folded_weight() if isinstance(conv, DiracConv2d) else conv.weight
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = scale.view(-1, 1, 1, 1) * weight[:, : part.shape()[1]]
        return weight, norm.bias - scale * norm.running_mean

    def _is_rectified(self, place: int) -> bool:
        """Whether a ReLU comes next, through a pool or not: what it removes takes no part of the range."""
        after = (layer for _, layer in self._layers[place + 1 :] if not isinstance(layer, nn.MaxPool2d))
        return isinstance(next(after), nn.ReLU)


def round_activations(x: Tensor, *, rectified: bool = False) -> Tensor:
    """x in 256 levels between its least and its largest value, of which 0 is one; `rectified` clips at 0."""
    low, high = x.detach().aminmax()
    return round_between(torch.zeros_like(low) if rectified else low, high, x)


def round_between(low: Tensor, high: Tensor, x: Tensor) -> Tensor:
    """x in the 256 levels from `low`, or 0, to `high`, or 0; what lies beyond is clipped and gets no gradient."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = torch.where(high > low, (high - low) / 255, 1.0)
    zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def round_filters(weight: Tensor) -> Tensor:
    """Filters [N_o, ...] in 127 levels of either sign, with a scale for each, as `quantize_filters` of the export.

    The two largest weights of one sign take 127 levels together: no processor's sum of two products saturates.
    """
    filters = weight.detach().flatten(1)
    pairs = [part.clamp_min(0).topk(min(2, part.shape[1])).values.sum(1) for part in (filters, -filters)]
    reach = torch.stack([filters.abs().amax(1), *pairs]).amax(0)
    scales = torch.where(reach > 0, reach / 127, 1.0)
    zeros = torch.zeros(len(filters), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)
