"""Random nets against their fold in float64: branches in branches, of one to three dimensions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_nets import Sum, error, moved, noise
from torch import nn

from fold.graph import fold
from fold.rules import simplify
from train.layers import DiracConv1d, DiracConv2d, DiracConv3d, NCReLU

CHANNELS = 4
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
DIRAC = {1: DiracConv1d, 2: DiracConv2d, 3: DiracConv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MEANS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAXIMA = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ZEROS = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 5)}
# As deep as these nets are, roundings of 2^-53 grow to some 1e-14 of the largest output; a wrong fold is off by 1e-3.
TOLERANCE = 1e-12


class Scale(nn.Module):
    def __init__(self, factor, shift):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x):
        return self.factor * x + self.shift


class Halves(nn.Module):
    """The two halves of the channels, each by itself, put together again."""

    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x):
        half = CHANNELS // 2
        return torch.cat([self.one(x)[:, :half], self.other(x)[:, half:]], dim=1)


@st.composite
def kernels(draw, dims):
    """A size, a dilation, and zeros before and after, with which a convolution keeps the image's size."""
    size, dilation = (draw(st.tuples(*[st.integers(1, top)] * dims)) for top in (3, 2))
    spans = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    before = [draw(st.integers(0, span)) for span in spans]
    return size, dilation, [(start, span - start) for start, span in zip(before, spans, strict=True)]


@st.composite
def convolutions(draw, dims, num_in=CHANNELS):
    size, dilation, pairs = draw(kernels(dims))
    groups, bias = draw(st.sampled_from((1, 1, 2, 4))), draw(st.booleans())
    how = {"dilation": dilation, "groups": groups, "bias": bias}
    if all(start == end for start, end in pairs):
        return CONVOLUTIONS[dims](num_in, CHANNELS, size, padding=[start for start, _ in pairs], **how)
    flat = [end for pair in reversed(pairs) for end in pair]
    return nn.Sequential(ZEROS[dims](tuple(flat)), CONVOLUTIONS[dims](num_in, CHANNELS, size, **how))


@st.composite
def layers(draw, dims):
    """One that keeps channels and size."""
    kind = draw(st.sampled_from("convolution norm relu ncrelu dirac mean max scale tanh relu6".split()))
    match kind:
        case "convolution":
            return draw(convolutions(dims))
        case "norm":
            return NORMS[dims](CHANNELS)
        case "relu":
            return nn.ReLU()
        case "ncrelu":
            return nn.Sequential(NCReLU(), draw(convolutions(dims, 2 * CHANNELS)))
        case "dirac":
            return nn.Sequential(NCReLU(), DIRAC[dims](2 * CHANNELS, CHANNELS, 3, padding=1))
        case "mean":
            return MEANS[dims](3, 1, 1, count_include_pad=draw(st.booleans()))
        case "max":
            return MAXIMA[dims](3, 1, 1)
        case "scale":
            return Scale(draw(st.sampled_from((1.0, -0.5, 2.0))), draw(st.sampled_from((0.0, 0.25))))
        case "tanh":
            return nn.Tanh()
        case _:
            return nn.ReLU6()


def nets(dims):
    return st.recursive(
        layers(dims),
        lambda parts: st.one_of(
            st.lists(parts, min_size=0, max_size=4).map(lambda found: nn.Sequential(*found)),
            st.lists(parts, min_size=2, max_size=4).map(lambda found: Sum(*found)),
            st.tuples(parts, parts).map(lambda found: Halves(*found)),
        ),
        max_leaves=10,
    )


@pytest.mark.slow
@given(st.integers(1, 3).flatmap(lambda dims: st.tuples(st.just(dims), nets(dims))), st.integers(0, 99))
def test_a_random_net_folds_to_its_own_outputs_and_no_rule_is_left(drawn, seed):
    dims, net = drawn
    x = noise(2, CHANNELS, *SIZES[dims])
    net = moved(nn.Sequential(net, nn.AdaptiveAvgPool1d(1) if dims == 1 else nn.Identity(), nn.Flatten()), seed)
    plain = fold(net, x)
    assert error(net, plain, x) < TOLERANCE
    graph = plain.graph
    again = simplify(graph)
    assert [(node.name, node.op) for node in again.nodes] == [(node.name, node.op) for node in graph.nodes]
