"""Branches of one input that are added, and linear maps that follow one another: as in test_rules.py."""

import pytest
import torch
from small_nets import Lambda, Sum, check_row, conv
from torch import nn

X, X1, X3, FLAT = (2, 4, 7, 6), (2, 4, 9), (2, 4, 5, 6, 7), (3, 5)
ONE = {"conv": 1}
TWO = {"conv": 2, "add": 1}


def chain(*layers):
    return nn.Sequential(*layers)


def conv1(size=3, **how):
    return nn.Conv1d(4, 4, size, **{"padding": size // 2, **how})


def conv3(size=3, **how):
    return nn.Conv3d(4, 4, size, **{"padding": size // 2, **how})


def mean(size=3, **how):
    return nn.AvgPool2d(size, **{"stride": 1, "padding": 0 if isinstance(size, tuple) else size // 2, **how})


def not_merged(reason, one="branches.0", other="branches.1", at="add"):
    return f"{at}: {one} and {other} not merged: {reason}"


SUMS = {
    # Kernels of other sizes, and what is not square.
    "3x3, 1x1, 5x5, batch norm, identity": (
        Sum(conv(), conv(size=1), conv(size=5), nn.BatchNorm2d(4), nn.Identity()),
        X,
        ONE,
    ),
    "3x1, 1x3, 3x3": (Sum(conv(size=(3, 1), padding=(1, 0)), conv(size=(1, 3), padding=(0, 1)), conv()), X, ONE),
    "batch norm after one branch": (Sum(chain(conv(), nn.BatchNorm2d(4)), nn.BatchNorm2d(4)), X, ONE),
    "to twice the channels": (Sum(conv(4, 8), conv(4, 8, 1)), X, ONE),
    "1-D": (Sum(conv1(), conv1(1), nn.BatchNorm1d(4), nn.Identity()), X1, ONE),
    "3-D": (Sum(conv3(), conv3(1), nn.BatchNorm3d(4), nn.Identity()), X3, ONE),
    "the same branch twice": (Lambda(lambda x, a: (lambda y: y + y)(a(x)), conv()), X, ONE),
    "the same branch three times": (Lambda(lambda x, a: (lambda y: y + y + y)(a(x)), conv()), X, {"conv": 1, "add": 1}),
    "the same branch before and after identity": (Lambda(lambda x, a: (lambda y: y + x + y)(a(x)), conv()), X, ONE),
    "the same pool three times beside a convolution": (
        Lambda(lambda x, a, b: (lambda y: y + y + b(x) + y)(a(x)), mean(), conv()),
        X,
        ONE,
    ),
    "a difference": (Lambda(lambda x, a, b: a(x) - b(x), conv(), conv(size=1)), X, ONE),
    "a scale for each channel": (
        Lambda(
            lambda x, a, n: a(x) * torch.arange(1.0, 5).view(4, 1, 1).double() + 0.5 * n(x), conv(), nn.BatchNorm2d(4)
        ),
        X,
        ONE,
    ),
    # Groups become common ones.
    "depthwise, two groups, dense": (Sum(conv(groups=4), conv(), conv(groups=2)), X, ONE),
    "two and three groups": (Sum(conv(6, 12, groups=2), conv(6, 12, groups=3), conv(6, 12, 5)), (2, 6, 7, 6), ONE),
    "depthwise beside identity": (Sum(conv(groups=4), nn.Identity()), X, ONE),
    "a small dense beside a large depthwise kernel": (
        Sum(conv(size=1), conv(size=7, groups=4)),
        X,
        TWO,
        not_merged("one convolution would have 3.7 times the work"),
    ),
    # Padding at one end, and more than a kernel needs.
    "zeros at one end": (Sum(chain(nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(4, 4, 2)), conv(), conv(size=1)), X, ONE),
    "zeros at the other end": (
        Sum(conv(size=1), chain(nn.ZeroPad2d((1, 0, 0, 1)), nn.Conv2d(4, 4, 2))),
        X,
        ONE,
    ),
    "padding that PyTorch works out": (Sum(conv(size=(3, 5), padding="same", dilation=(2, 1)), conv(size=5)), X, ONE),
    "taps beside each other": (
        Sum(chain(nn.ZeroPad1d((1, 0)), conv1(1)), chain(nn.ZeroPad1d((0, 1)), conv1(1))),
        X1,
        ONE,
    ),
    "valid beside valid of one size": (Sum(conv(padding=0), conv(padding=0), mean(padding=0)), X, ONE),
    "outputs of other sizes": (
        Sum(conv(), conv(padding=0)),
        (2, 4, 3, 3),
        TWO,
        not_merged("their outputs have different sizes"),
    ),
    # Strides.
    "stride 2 beside stride 2": (Sum(conv(stride=2), conv(size=1, stride=2), mean(stride=2)), X, ONE),
    "strides of each dimension": (Sum(conv(stride=(2, 1)), conv(size=1, stride=(2, 1))), X, ONE),
    "stride 2 beside identity": (
        Sum(conv(stride=2, padding=3), nn.Identity()),
        (2, 4, 4, 4),
        {"conv": 1, "add": 1},
        not_merged("stride 2 beside identity", other="input"),
    ),
    "stride 2 beside stride 1": (
        Sum(conv(stride=2, padding=3), conv(size=1)),
        (2, 4, 4, 4),
        TWO,
        not_merged("stride 2 beside stride 1"),
    ),
    "a stride of one dimension beside identity": (
        Sum(nn.Identity(), conv(stride=(1, 2), padding=(1, 3))),
        (2, 4, 4, 4),
        {"conv": 1, "add": 1},
        not_merged("stride 1x2 beside identity", one="input"),
    ),
    "stride 2 beside batch norm": (
        Sum(conv(stride=2, padding=3), nn.BatchNorm2d(4)),
        (2, 4, 4, 4),
        TWO,
        not_merged("stride 2 beside stride 1"),
    ),
    # Dilation.
    "dilation of 2 beside 5x5 and 1x1": (Sum(conv(padding=2, dilation=2), conv(size=5), conv(size=1)), X, ONE),
    "dilation of 2 twice": (Sum(conv(padding=2, dilation=2), conv(size=5, padding=4, dilation=2)), X, ONE),
    "dilation of 2 between the taps of another": (Sum(conv(size=2, padding=1, dilation=2), conv()), X, ONE),
    "taps that lie between": (
        Sum(conv(padding=2, dilation=2), conv(size=2, padding=1, dilation=2), conv(size=5)),
        X,
        ONE,
    ),
    "dilation of 2 beside identity": (Sum(nn.Identity(), conv(padding=2, dilation=2)), X, ONE),
    "dilation of each dimension": (
        Sum(conv(padding=(1, 2), dilation=(1, 2)), conv(size=1), conv()),
        X,
        ONE,
    ),
    "a dilation that would be filled": (
        Sum(conv(padding=3, dilation=3), conv()),
        X,
        TWO,
        not_merged("one convolution would have 2.7 times the work"),
    ),
    # Average pools.
    "an average pool": (Sum(mean(), conv()), X, ONE),
    "an average pool first in 1-D": (Sum(nn.AvgPool1d(3, 1, 1), conv1()), X1, ONE),
    "an average pool in 3-D": (Sum(conv3(), nn.AvgPool3d(3, 1, 1)), X3, ONE),
    "an average pool of its own kernel": (Sum(conv(size=1), mean((3, 1), padding=(1, 0)), conv()), X, ONE),
    "an average pool alone": (mean(), X, {"avg_pool": 1}),
    "two average pools": (Sum(mean(), mean(5)), X, {"avg_pool": 2, "add": 1}),
    "an average pool beside identity": (Sum(mean(), nn.Identity()), X, {"avg_pool": 1, "add": 1}),
    "an average pool that leaves zeros out": (
        Sum(mean(count_include_pad=False), conv()),
        X,
        {"avg_pool": 1, "conv": 1, "add": 1},
    ),
    "one that would leave zeros out, and has none": (
        Sum(mean(padding=0, count_include_pad=False), conv(padding=0)),
        X,
        ONE,
    ),
    "an average pool that looks over the edge": (
        Sum(nn.AvgPool2d(3, 2, ceil_mode=True), nn.Conv2d(4, 4, 1, 2)),
        (2, 4, 6, 6),
        {"avg_pool": 1, "conv": 1, "add": 1},
    ),
    # Matrices.
    "two matrices": (Sum(nn.Linear(5, 4), nn.Linear(5, 4)), FLAT, {"linear": 1}),
    "a matrix, identity and batch norm": (Sum(nn.Linear(5, 5), nn.Identity(), nn.BatchNorm1d(5)), FLAT, {"linear": 1}),
    "matrices of rows": (Sum(nn.Linear(6, 6), nn.Linear(6, 6)), (2, 4, 6), {"linear": 2, "add": 1}),
    # Terms that are no linear maps of one input.
    "of other inputs": (Lambda(lambda x, a, b: a(x.tanh()) + b(x), conv(), conv()), X, {**TWO, "tanh": 1}),
    "an activation between": (Sum(conv(), chain(conv(), nn.ReLU())), X, {**TWO, "relu": 1}),
    "a branch that others read": (
        Lambda(lambda x, a, b: (lambda y: (y + b(x)) * y.tanh())(a(x)), conv(), conv()),
        X,
        {**TWO, "tanh": 1, "mul": 1},
    ),
    "one channel beside four": (
        Sum(conv(), conv(4, 1)),
        X,
        TWO,
        not_merged("4 channels beside 1"),
    ),
    "a max-pool": (Sum(conv(stride=2), nn.MaxPool2d(1, 2)), X, {"conv": 1, "max_pool": 1, "add": 1}),
}

BETWEEN = "1: not merged with 0: a bias would be missing in the zeros that are padded between them"
CHAINS = {
    "1x1 before 3x3": (chain(conv(size=1), conv(padding=0)), X, ONE),
    "1x1 before 3x3 with stride and dilation": (chain(conv(size=1), conv(padding=0, stride=2, dilation=2)), X, ONE),
    "1x1 without a bias before padded 3x3": (chain(conv(size=1, bias=False), conv()), X, ONE),
    "1x1 before padded 3x3": (chain(conv(size=1), conv()), X, {"conv": 2}, BETWEEN),
    "1x1 before 3x3 padded at one end": (
        chain(conv(size=1), nn.ZeroPad2d((0, 0, 0, 1)), conv(padding=0)),
        X,
        {"conv": 2},
        BETWEEN.replace("1:", "2:"),
    ),
    "padded 1x1 before 3x3": (chain(conv(size=1, padding=1, bias=False), conv(padding=0)), X, {"conv": 2}, BETWEEN),
    "1x1 with a stride before 3x3": (
        chain(conv(size=1, stride=2), conv(padding=0)),
        X,
        {"conv": 2},
        "1: not merged with 0: neither kernel is 1x1, or the first has a stride",
    ),
    "3x3 before 1x1": (chain(conv(), conv(size=1)), X, ONE),
    "3x3 with stride and dilation before 1x1 with a stride": (
        chain(conv(stride=(1, 2), dilation=2, padding=2), conv(size=1, stride=2)),
        (2, 4, 12, 13),
        ONE,
    ),
    "3x3 before padded 1x1": (
        chain(conv(), conv(size=1, padding=1)),
        X,
        {"conv": 2},
        "1: not merged with 0: zeros are padded between them",
    ),
    "1x1 before 1x1 with strides": (chain(conv(size=1, stride=2), conv(size=1, stride=2)), X, ONE),
    "3x3 before 3x3": (
        chain(conv(), conv()),
        X,
        {"conv": 2},
        "1: not merged with 0: neither kernel is 1x1, or the first has a stride",
    ),
    "depthwise before 1x1": (
        chain(conv(groups=4), conv(size=1)),
        X,
        {"conv": 2},
        "1: not merged with 0: a convolution with groups",
    ),
    "1x1 before depthwise": (
        chain(conv(size=1), conv(groups=4, padding=0)),
        X,
        {"conv": 2},
        "1: not merged with 0: a convolution with groups",
    ),
    "a narrow place between": (
        chain(conv(4, 1, 1), conv(1, 4, 1)),
        X,
        {"conv": 2},
        "1: not merged with 0: one convolution would have more work than both",
    ),
    "in 1-D": (chain(conv1(1), conv1(padding=0), nn.Conv1d(4, 3, 1)), X1, ONE),
    "in 3-D": (chain(conv3(1), conv3(padding=0), nn.Conv3d(4, 3, 1)), X3, ONE),
    "two matrices": (chain(nn.Linear(5, 4), nn.Linear(4, 3)), FLAT, {"linear": 1}),
    "a narrow place that saves nothing": (chain(nn.Linear(4, 2), nn.Linear(2, 4)), (3, 4), {"linear": 1}),
    "two matrices of rows": (chain(nn.Linear(6, 4), nn.Linear(4, 3)), (2, 4, 6), {"linear": 1}),
    "a matrix and an activation": (chain(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), FLAT, {"linear": 2, "tanh": 1}),
    "a convolution before a matrix of its rows": (chain(conv1(), nn.Linear(9, 3)), X1, {"conv": 1, "linear": 1}),
    "read by two": (
        Lambda(lambda x, a, b: (lambda y: b(y).tanh() + y.tanh())(a(x)), conv(), conv(size=1)),
        X,
        {"conv": 2, "tanh": 2, "add": 1},
        "layers.1: not merged with layers.0: 2 nodes read it",
    ),
    "branches, then what follows them": (
        chain(Sum(conv(), conv(size=1), nn.BatchNorm2d(4)), nn.BatchNorm2d(4), conv(size=1), nn.ReLU()),
        X,
        {"conv": 1, "relu": 1},
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_branches_of_one_input_are_one_convolution_or_it_is_said_why_not(name):
    check_row(*SUMS[name])


@pytest.mark.parametrize("name", CHAINS)
def test_linear_maps_in_a_row_are_one_or_it_is_said_why_not(name):
    check_row(*CHAINS[name])
