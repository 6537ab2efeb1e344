"""The verdict of a proof, number by number."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch

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
