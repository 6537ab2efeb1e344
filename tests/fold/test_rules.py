"""Each rule of fold/rules.py: where it applies, every condition that keeps it from being applied, and what it says.

A row is a net, the shape of its input, the operations that are left, and the whole of what is said.
The outputs are those of the net itself: a rule that applies where it must not is wrong there, and one that does
not apply where it can leaves other operations.
"""

from functools import reduce

import pytest
import torch
from small_nets import Lambda, check_row, conv, moved, noise
from torch import nn
from torch.nn import functional as F

from fold.graph import fold
from fold.rules import RULES
from train.layers import NCReLU

X, X1, X3 = (2, 4, 7, 6), (2, 4, 9), (2, 4, 5, 6, 7)
ROWS = {}


def rows(rule, **of_rule):
    """`net, shape, operations that are left, what is said`."""
    ROWS.update({f"{rule.replace(' ', '_')}: {name.replace('_', ' ')}": row for name, row in of_rule.items()})


def chain(*layers):
    return nn.Sequential(*layers)


def scaled(scale=1.0, shift=0.0):
    return Lambda(lambda x: x * scale + shift)


def tanh(*layers):
    """Layers between nonlinearities that no rule passes."""
    return chain(nn.Tanh(), *layers, nn.Tanh())


TANH = {"tanh": 2}

rows(
    "no_operation",
    one_times_x=(tanh(scaled()), X, TANH),
    a_scale_stays=(tanh(scaled(2.0)), X, {**TANH, "affine": 1}),
    a_shift_stays=(tanh(scaled(1.0, 0.5)), X, {**TANH, "affine": 1}),
    at_the_end=(chain(nn.Tanh(), scaled()), X, {"tanh": 1}),
)

rows(
    "relu_of_nonnegative",
    of_relu=(chain(nn.ReLU(), nn.ReLU()), X, {"relu": 1}),
    of_sigmoid=(chain(nn.Sigmoid(), nn.ReLU()), X, {"sigmoid": 1}),
    of_hardsigmoid=(chain(nn.Hardsigmoid(), nn.ReLU()), X, {"hardsigmoid": 1}),
    of_relu6=(chain(nn.ReLU6(), nn.ReLU()), X, {"clip": 1}),
    of_a_clip_below_zero=(chain(nn.Hardtanh(-1, 1), nn.ReLU()), X, {"clip": 1, "relu": 1}),
    through_pools=(
        chain(nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU()),
        X,
        {"relu": 1, "max_pool": 1, "avg_pool": 1, "global_pool": 1, "flatten": 1},
    ),
    through_a_slice=(Lambda(lambda x: F.relu(F.relu(x)[:, 1:3])), X, {"relu": 1, "slice": 1}),
    of_ncrelu=(chain(NCReLU(), nn.ReLU()), X, {"ncrelu": 1, "relu": 1}),
    of_tanh=(chain(nn.Tanh(), nn.ReLU()), X, {"tanh": 1, "relu": 1}),
    of_silu=(chain(nn.SiLU(), nn.ReLU()), X, {"silu": 1, "relu": 1}),
    of_gelu=(chain(nn.GELU(), nn.ReLU()), X, {"gelu": 1, "relu": 1}),
    of_leaky_relu=(chain(nn.LeakyReLU(0.2), nn.ReLU()), X, {"leaky_relu": 1, "relu": 1}),
    of_hardswish=(chain(nn.Hardswish(), nn.ReLU()), X, {"hardswish": 1, "relu": 1}),
    of_batch_norm=(chain(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()), X, {"conv": 1, "relu": 2}),
    another_activation=(chain(nn.ReLU(), nn.Tanh()), X, {"relu": 1, "tanh": 1}),
    of_a_sum=(Lambda(lambda x: F.relu(F.relu(x) + x)), X, {"relu": 2, "add": 1}),
)

GROUPS = "1: not merged with 0: a convolution with groups"
rows(
    "depthwise_point",
    after_groups=(chain(conv(groups=2), conv(size=1, groups=4)), X, {"conv": 1}),
    before_groups=(chain(conv(size=1, groups=4, bias=False), conv(groups=2)), X, {"conv": 1}),
    in_1_d=(chain(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 1, groups=4)), X1, {"conv": 1}),
    two_filters_a_channel=(
        chain(conv(groups=2), conv(4, 8, 1, groups=4)),
        X,
        {"conv": 2},
        GROUPS,
    ),
    a_kernel=(chain(conv(groups=2), conv(size=3, groups=4)), X, {"conv": 2}, GROUPS),
    a_stride=(
        chain(conv(groups=2), conv(size=1, groups=4, stride=2)),
        X,
        {"conv": 2},
        GROUPS,
    ),
    padding=(
        chain(conv(groups=2), conv(size=1, groups=4, padding=1)),
        X,
        {"conv": 2},
        GROUPS,
    ),
    one_channel_to_four=(tanh(conv(1, 4, 1)), (2, 1, 5, 5), {**TANH, "conv": 1}),
    alone_it_is_a_convolution=(tanh(conv(size=1, groups=4)), X, {**TANH, "conv": 1}),
)

rows(
    "zero_half",
    of_relu=(chain(nn.ReLU(), NCReLU(), conv(8)), X, {"relu": 1, "conv": 1}),
    of_sigmoid_in_1_d=(chain(nn.Sigmoid(), NCReLU(), nn.Conv1d(8, 4, 3)), X1, {"sigmoid": 1, "conv": 1}),
    through_pools=(
        chain(nn.ReLU(), NCReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ReLU(), conv(8)),
        X,
        {"relu": 1, "max_pool": 1, "avg_pool": 1, "conv": 1},
    ),
    into_a_matrix=(
        chain(nn.ReLU(), NCReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
        X,
        {"relu": 1, "global_pool": 1, "flatten": 1, "linear": 1},
    ),
    into_a_matrix_of_pixels=(
        chain(nn.ReLU(), NCReLU(), nn.Flatten(), nn.Linear(24, 3)),
        (2, 4, 3, 1),
        {"relu": 1, "flatten": 1, "linear": 1},
    ),
    not_into_a_matrix_of_rows=(
        chain(nn.ReLU(), NCReLU(), nn.Linear(6, 3)),
        (2, 4, 6),
        {"relu": 1, "ncrelu": 1, "linear": 1},
    ),
    not_through_an_activation=(
        chain(nn.ReLU(), NCReLU(), nn.Sigmoid(), conv(8)),
        X,
        {"relu": 1, "ncrelu": 1, "sigmoid": 1, "conv": 1},
    ),
    not_through_a_batch_norm=(
        chain(nn.ReLU(), NCReLU(), nn.BatchNorm2d(8), conv(8)),
        X,
        {"relu": 1, "ncrelu": 1, "conv": 2},
        "3: not merged with 2: its shift is missing in the zeros that are padded",
    ),
    not_through_a_concatenation=(
        Lambda(lambda x, a, half: a(torch.cat([half(x.relu()), x], 1)), conv(12), NCReLU()),
        X,
        {"relu": 1, "ncrelu": 1, "cat": 1, "conv": 1},
    ),
    not_through_a_slice=(
        Lambda(lambda x, a, half: a(half(x.relu())[:, 2:6]), conv(4), NCReLU()),
        X,
        {"relu": 1, "ncrelu": 1, "slice": 1, "conv": 1},
    ),
    of_what_may_be_negative=(chain(nn.Tanh(), NCReLU(), conv(8)), X, {"tanh": 1, "ncrelu": 1, "conv": 1}),
    with_groups=(
        chain(nn.ReLU(), NCReLU(), conv(8, groups=2)),
        X,
        {"relu": 1, "ncrelu": 1, "conv": 1},
        "2: half of 1 is zero and stays: the convolution has groups",
    ),
    read_by_two=(
        Lambda(
            lambda x, a, b, half: (lambda y: a(y).tanh() + b(y).tanh())(half(x.relu())),
            conv(8),
            conv(8),
            NCReLU(),
        ),
        X,
        {"relu": 1, "ncrelu": 1, "conv": 2, "tanh": 2, "add": 1},
        "layers.0: half of layers.2 is zero and stays: 2 nodes read it",
        "layers.1: half of layers.2 is zero and stays: 2 nodes read it",
    ),
    a_pool_read_by_two=(
        Lambda(
            lambda x, a, half: (lambda y: a(y).tanh() + y.tanh())(F.max_pool2d(half(x.relu()), 2)),
            conv(8, 8),
            NCReLU(),
        ),
        X,
        {"relu": 1, "ncrelu": 1, "max_pool": 1, "conv": 1, "tanh": 2, "add": 1},
    ),
)

rows(
    "affine_of_affine",
    two_batch_norms=(tanh(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), X, {**TANH, "conv": 1}),
    a_number_and_a_batch_norm=(tanh(scaled(2.0, 1.0), nn.BatchNorm1d(4), scaled(0.5)), (3, 4), {**TANH, "affine": 1}),
    the_first_read_by_two=(
        Lambda(lambda x, a, b: (lambda y: b(y).tanh() + y.tanh())(a(x)), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        X,
        {"conv": 2, "tanh": 2, "add": 1},
        "layers.1: not merged with layers.0: 2 nodes read it",
    ),
)

ROW_OF_A_MATRIX = "not merged with 0: its channels are not known to be the matrix's rows"
rows(
    "affine_after_linear",
    batch_norm=(chain(conv(), nn.BatchNorm2d(4)), X, {"conv": 1}),
    a_scale_for_each_channel=(chain(conv(groups=2), nn.BatchNorm2d(4), scaled(3.0)), X, {"conv": 1}),
    in_1_d=(chain(nn.Conv1d(4, 6, 3, 2, 1), nn.BatchNorm1d(6)), X1, {"conv": 1}),
    in_3_d=(chain(nn.Conv3d(4, 6, 3, 1, 1, groups=2), nn.BatchNorm3d(6)), X3, {"conv": 1}),
    after_a_matrix=(chain(nn.Linear(5, 4), nn.BatchNorm1d(4), scaled(2.0, 1.0)), (3, 5), {"linear": 1}),
    after_a_matrix_along_rows=(
        chain(nn.Linear(6, 6), nn.BatchNorm1d(6)),
        (3, 6, 6),
        {"linear": 1, "conv": 1},
        f"1: {ROW_OF_A_MATRIX}",
    ),
    read_by_two=(
        Lambda(lambda x, a, b: (lambda y: b(y).tanh() + y.tanh())(a(x)), conv(), nn.BatchNorm2d(4)),
        X,
        {"conv": 2, "tanh": 2, "add": 1},
        "layers.1: not merged with layers.0: 2 nodes read it",
    ),
)

COLUMN_OF_A_MATRIX = "not merged with 0: its channels are not known to be the matrix's columns"
rows(
    "affine_before_linear",
    with_groups=(chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), X, {"conv": 1}),
    in_1_d=(chain(nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, 2)), X1, {"conv": 1}),
    in_3_d=(chain(nn.BatchNorm3d(4), nn.Conv3d(4, 6, 2, groups=2)), X3, {"conv": 1}),
    before_a_matrix=(chain(nn.BatchNorm1d(5), nn.Linear(5, 4)), (3, 5), {"linear": 1}),
    a_scale_beside_zeros=(chain(scaled(3.0), conv(groups=2)), X, {"conv": 1}),
    a_shift_beside_zeros=(
        chain(nn.BatchNorm2d(4), conv()),
        X,
        {"conv": 2},
        "1: not merged with 0: its shift is missing in the zeros that are padded",
    ),
    zeros_at_one_end=(
        chain(nn.BatchNorm2d(4), nn.ZeroPad2d((0, 0, 0, 1)), nn.Conv2d(4, 4, 3)),
        X,
        {"conv": 2},
        "2: not merged with 0: its shift is missing in the zeros that are padded",
    ),
    before_a_matrix_along_rows=(
        chain(nn.BatchNorm1d(4), nn.Linear(5, 4)),
        (3, 4, 5),
        {"conv": 1, "linear": 1},
        f"1: {COLUMN_OF_A_MATRIX}",
    ),
    read_by_two=(
        Lambda(lambda x, a, b: (lambda y: b(y).tanh() + y.tanh())(a(x)), nn.BatchNorm2d(4), conv(padding="same")),
        X,
        {"conv": 2, "tanh": 2, "add": 1},
        "layers.1: not merged with layers.0: 2 nodes read it",
    ),
)

rows(
    "pad_before_convolution",
    on_two_sides=(chain(nn.ZeroPad2d((1, 2, 0, 3)), conv()), X, {"conv": 1}),
    beside_other_padding=(chain(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(4, 4, (3, 5), padding="same")), X, {"conv": 1}),
    with_stride_and_dilation=(
        chain(nn.ZeroPad2d((1, 0, 0, 2)), nn.Conv2d(4, 4, 3, stride=2, dilation=2, groups=2)),
        X,
        {"conv": 1},
    ),
    in_1_d=(chain(nn.ZeroPad1d((3, 1)), nn.Conv1d(4, 4, 3, padding=1)), X1, {"conv": 1}),
    in_3_d=(chain(nn.ZeroPad3d((3, 1, 0, 2, 1, 0)), nn.Conv3d(4, 4, 3)), X3, {"conv": 1}),
    of_the_last_dimension_alone=(Lambda(lambda x, a: a(F.pad(x, (2, 1))), nn.Conv2d(4, 4, 3)), X, {"conv": 1}),
    read_by_two=(
        Lambda(lambda x, a: (lambda y: a(y).tanh() + y.tanh())(F.pad(x, (2, 1))), conv()),
        X,
        {"pad": 1, "conv": 1, "tanh": 2, "add": 1},  # what others read stays; the convolution reads past it
    ),
    before_something_else=(chain(nn.ZeroPad2d(1), nn.MaxPool2d(2)), X, {"pad": 1, "max_pool": 1}),
    in_front_of_a_matrix=(chain(nn.ZeroPad2d(1), nn.Linear(8, 3)), X, {"pad": 1, "linear": 1}),
)

rows(
    "subsampling_before_point",
    by_the_mean_of_one_pixel=(chain(nn.AvgPool2d(1, 2), conv(size=1, stride=(1, 2), groups=2)), X, {"conv": 1}),
    in_1_d=(chain(nn.MaxPool1d(1, 3), nn.Conv1d(4, 4, 1)), X1, {"conv": 1}),
    before_a_kernel=(chain(nn.MaxPool2d(1, 2), conv(padding=0)), X, {"max_pool": 1, "conv": 1}),
    before_padding=(chain(nn.AvgPool2d(1, 2), conv(size=1, padding=1)), X, {"avg_pool": 1, "conv": 1}),
    of_more_pixels=(chain(nn.MaxPool2d((1, 2), 2), conv(size=1)), X, {"max_pool": 1, "conv": 1}),
    read_by_two=(
        Lambda(lambda x, a: (lambda y: a(y).tanh() + y.tanh())(F.max_pool2d(x, 1, 2)), conv(size=1)),
        X,
        {"max_pool": 1, "conv": 1, "tanh": 2, "add": 1},
    ),
)

NESTED = (conv(), conv(size=1), conv(groups=2))
rows(
    "flat_sum",
    in_a_concatenation=(
        Lambda(lambda x, a, b, c: torch.cat([a(x) + x.tanh(), b(x)], 1), *NESTED),
        X,
        {"conv": 2, "tanh": 1, "add": 1, "cat": 1},
    ),
    from_the_left=(Lambda(lambda x, a, b, c: (a(x) + x.tanh()) + c(x), *NESTED), X, {"conv": 1, "tanh": 1, "add": 1}),
    from_the_right=(Lambda(lambda x, a, b, c: a(x) + (x.tanh() + c(x)), *NESTED), X, {"conv": 1, "tanh": 1, "add": 1}),
    from_zero=(
        Lambda(lambda x, a, b, c: 0 + a(x) + x.tanh() + c(x) + 0.0, *NESTED),
        X,
        {"conv": 1, "tanh": 1, "add": 1},
    ),
    twice_the_same=(
        Lambda(lambda x, a, b, c: (lambda y: y + y)(a(x) + x.tanh()), *NESTED),
        X,
        {"conv": 1, "tanh": 1, "add": 1},
    ),
    read_by_two=(
        Lambda(lambda x, a, b, c: (lambda y: (y + c(x)) * y.sigmoid())(a(x) + x.tanh()), *NESTED),
        X,
        {"conv": 2, "tanh": 1, "add": 2, "sigmoid": 1, "mul": 1},
    ),
)


def test_a_sum_that_others_read_is_not_added_up_twice():
    """The running sum of a residual net: every addition keeps two terms."""
    blocks = [nn.Sequential(nn.ReLU(), conv()) for _ in range(3)]
    net = Lambda(lambda x, *layers: reduce(lambda y, layer: y + layer(y), layers, x), *blocks)
    graph = fold(moved(net), noise(*X)).graph
    assert [len(node.inputs) for node in graph.nodes if node.op == "add"] == [2, 2, 2]


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_applies_where_it_may_and_says_why_not(name):
    check_row(*ROWS[name])


def test_every_rule_has_rows():
    tested = {name.partition(":")[0] for name in ROWS} | {"sum_of_linear", "linear_of_linear"}
    assert tested == {rule.__name__ for rule in RULES}, "the last two are in test_sums_and_chains.py"
