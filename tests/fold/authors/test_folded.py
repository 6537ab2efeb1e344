"""Folded nets of the authors' that are nearly whole."""

import re

import pytest
import torch
from authors import folded_first, folded_second

from common.refusal import Refusal
from fold.authors.files import Saved, read_saved
from fold.authors.nets import plain_of


def numbers_of(make):
    return dict(read_saved("net", make(base=2)[0]).numbers)


def without(numbers, *names):
    return {name: value for name, value in numbers.items() if name not in names}


@pytest.mark.parametrize("make", [folded_first, folded_second])
def test_a_whole_one_is_a_plain_net_without_a_dirac_layer(tmp_path, make):
    plain = plain_of(tmp_path, Saved(numbers_of(make), {}, folded=True), "digest", image_size=32)
    graph = plain.net.graph
    nonlinearities = {node.op for node in graph.nodes if node.name.startswith("group") and "relu" in node.op}
    assert nonlinearities == {{folded_first: "ncrelu", folded_second: "relu"}[make]}
    assert graph["pool"].inputs == ("relu",)  # in both releases
    assert {node.op for node in graph.nodes if node.tensors} == {"normalize", "conv", "linear"}


@pytest.mark.parametrize("make", [folded_first, folded_second])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: without(n, "group2.block1.conv.bias"), "imagenet: group2.block1.conv.bias is missing"),
        (
            lambda n: without(n, "group1.block3.conv.weight", "group1.block3.conv.bias"),
            "group1.block3.conv.weight is missing, group1.block3.conv.bias is missing",
        ),
        (lambda n: without(n, "group0.block0.conv.weight"), "group0.block0.conv.weight is missing"),
        (lambda n: without(n, "fc.weight"), "fc.weight is missing"),
        (lambda n: n | {"conv.bias": torch.zeros(3)}, "conv.bias is [3], must be [2]"),
        (lambda n: n | {"conv.weight": torch.zeros(3, 3, 7, 7)}, "conv.weight is [3, 3, 7, 7], must be [2, 3, 7, 7]"),
        (lambda n: n | {"fc.bias": torch.zeros(11)}, "fc.bias is [11], must be [10]"),
        (lambda n: n | {"bn.weight": torch.zeros(2)}, "bn.weight is not part of it"),
        (lambda n: n | {"conv.weight": torch.zeros(2, 3, 3, 3)}, "is a folded CIFAR net"),
        (
            lambda n: {name: value for name, value in n.items() if not name.startswith("group2")},
            "groups of 4, 4, 0, 4 convolutions: ImageNet nets have 4, 4, 4, 4 or 6, 8, 12, 6 or 6, 8, 12, 10",
        ),
    ],
)
def test_what_is_nearly_one_is_refused_by_the_tensor_s_name(tmp_path, make, change, message):
    saved = Saved(change(numbers_of(make)), {}, folded=True)
    with pytest.raises(Refusal, match=re.escape(message)) as caught:
        plain_of(tmp_path / "net.pth", saved, "digest", image_size=32)
    assert "\n" not in str(caught.value)
