"""Training for eight bits: filters and activations rounded as the int8 export rounds them, gradients left alone.

The export rounds s Ŵ, the filter with batch normalisation folded into it. With a scale for every filter its levels are
those of Ŵ, whatever s is: so Ŵ is rounded here, and batch normalisation follows as usual.
"""

import torch
from torch import Tensor, nn

from train.fine_tune.unfold import parts_of
from train.layers import DiracConv2d


class FakeQuantized(nn.Module):
    """A chain of layers as its int8 form computes it, in float32; parameters and statistics are those of `net`.

    As in export/eight_bits/integer.py, the stem and the classifier stay in float32. The outputs of the stem and of all
    other convolutions are rounded to unsigned bytes, filters to signed ones. The range of an activation is that of the
    batch, so there is nothing to remember; the export measures its own.
    """

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net
        stem, *parts = parts_of(net)
        self._parts = {part.name: part for part in parts}
        halved = {part.halved for part in parts}  # whose input the ReLU before has made positive
        modules = [pair for pair in net.named_modules() if not isinstance(pair[1], nn.Sequential)]
        self._names, layers = zip(*[(name, layer) for name, layer in modules if name not in halved], strict=True)
        last = self._names.index(stem.norm or stem.name)
        while isinstance(layers[last + 1], nn.ReLU | nn.MaxPool2d):
            last += 1
        # After these layers activations are rounded, and clipped at 0 where a ReLU, through a pool or not, comes next.
        self._rounded = {self._names[last]: False}
        for part in parts:
            end = self._names.index(part.norm or part.name)
            after = next(layer for layer in layers[end + 1 :] if not isinstance(layer, nn.MaxPool2d))
            self._rounded[self._names[end]] = isinstance(after, nn.ReLU)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for name in self._names:
            layer, part = self.net.get_submodule(name), self._parts.get(name)
            if part and isinstance(layer, nn.Conv2d):  # without the half that the fold drops
                weight = layer.folded_weight() if isinstance(layer, DiracConv2d) else layer.weight
                x = layer._conv_forward(x, round_filters(weight[:, : part.shape()[1]]), layer.bias)
            else:
                x = layer(x)
            if name in self._rounded:
                x = round_activations(x, rectified=self._rounded[name])
        return x


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
    scales = reach / 127
    scales = torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 1.0)
    zeros = torch.zeros(len(filters), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)
