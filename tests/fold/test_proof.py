"""The verdict of a proof, number by number."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from torch import nn

from common.difference import TOLERANCES
from fold.graph import fold
from fold.proof import prove


@pytest.fixture
def proof(make_net):
    net = make_net()
    return prove(net, fold(net), torch.randint(256, (2, 8, 8, 1), dtype=torch.uint8))


@pytest.mark.parametrize("relative", [nan, inf, 1.01 * TOLERANCES["float64"]])
def test_one_difference_beyond_tolerance_or_not_a_number_fails_it(proof, relative):
    assert proof
    assert not replace(proof, ends=(replace(proof.ends[0], precision="float64", relative=relative), *proof.ends[1:]))


def test_one_changed_class_fails_it(proof):
    assert not replace(proof, ends=(replace(proof.ends[0], top1_changes=1), *proof.ends[1:]))


def test_a_chain_of_layers_is_compared_with_its_own_layers_and_not_with_a_trace_of_them(make_net, monkeypatch):
    net, images = make_net(), torch.randint(256, (2, 8, 8, 1), dtype=torch.uint8)
    plain = fold(net)
    monkeypatch.setattr("fold.proof.trace", None)
    assert prove(net, plain, images)
    net.group1.block1.bn.bias.data += 1e-6  # after the fold
    changed = prove(net, plain, images)
    assert not changed
    off = [row.what for row in changed.layers if row.precision == "float64" and row.relative > TOLERANCES["float64"]]
    assert off[0] == "group1.block1.conv"


def test_a_layer_that_is_more_than_one_node_is_compared_with_what_it_traces_to():
    class Rectified(nn.Conv2d):
        def forward(self, input):
            return super().forward(input).relu()

    class Backwards(nn.Sequential):
        def forward(self, input):
            return self[0](self[1](input))

    torch.manual_seed(0)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)
    body = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    net = nn.Sequential(nn.ReLU(inplace=True), Rectified(3, 3, 3), Backwards(*body), nn.ReLU(), *ends).eval()
    x = torch.randn(2, 3, 6, 6)
    assert prove(net, fold(net, x), x.double())
