"""Lowerings: other layers, the same logits, in float64 and for every family."""

import itertools
from collections import Counter

import pytest
import torch
from small_nets import Sum
from small_nets import conv as small_conv
from torch import nn

from common.refusal import Refusal
from fold.graph import GraphNet, fold
from fold.lower import distinct_lowerings, lower
from fold.lowerings import LOWERINGS
from fold.nodes import Graph, Node
from train.layers import NCReLU, Residual, dirac_delta

TOLERANCE = 1e-12  # float64, as a share of the largest output


def layers_and_weights(net):
    """What a net computes, as text: its layers and the sum of every tensor."""
    yield net
    yield from (tensor.sum() for tensor in net.graph.tensors().values())


def convolutions(net):
    """Weights by name."""
    return {node.name: node.tensors["weight"] for node in net.graph.nodes if node.op == "conv"}


@pytest.fixture
def plain(make_net):
    """A plain net whose δ is strong enough to leave the filters; its a and γ are positive, as most trained ones."""

    def make(**fields):
        net = make_net(**fields)
        for name, tensor in net.state_dict().items():
            if name.endswith(".a"):
                tensor.abs_().add_(4)
            if name.endswith("bn.weight"):
                tensor.abs_().add_(0.2)
        return fold(net)

    return make


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_logits_stay_in_float64(make_net, images, row, lowering):
    net, pixels = fold(make_net(**row)), torch.from_numpy(images(3, row.get("size", 8)))
    with torch.no_grad():
        before, after = net(pixels), lower(net, lowering)(pixels)
    error = ((before - after).abs().max() / before.abs().max()).item()
    assert error <= TOLERANCE, f"{lowering} is off by {error:.1e} of the logits: fold/lower.py"


@pytest.mark.parametrize("nonlinearity", ["ncrelu", "relu"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_layers_keep_their_names_and_outputs(plain, images, lowering, nonlinearity):
    net = plain(depth=16, nonlinearity=nonlinearity)
    before, after = (dict(form.values(torch.from_numpy(images()))) for form in (net, lower(net, lowering)))
    assert len(convolutions(net)) == 13
    for name in convolutions(net):
        expected, found = before[name], after[name][:, : before[name].shape[1]]
        if lowering == "skip":  # up to a positive factor for every channel
            factor = (expected * found).sum(dim=(0, 2, 3)) / (found * found).sum(dim=(0, 2, 3))
            assert (factor > 0).all()
            found = found * factor.view(-1, 1, 1)
        assert (expected - found).abs().max() <= TOLERANCE * expected.abs().max(), name


def test_each_lowering_has_the_layers_that_its_name_promises(plain):
    net = plain(depth=16)
    counts = {lowering: Counter(node.op for node in lower(net, lowering).graph.nodes) for lowering in LOWERINGS}
    assert counts["concat"]["ncrelu"] == 11
    for lowering in ("shared", "shared-split", "split", "mirror"):
        assert counts[lowering]["ncrelu"] == 0
    layers = {"shared": (11, 0, 13), "shared-split": (0, 11, 24), "split": (0, 11, 24), "skip": (0, 12, 13)}
    for lowering, expected in layers.items():
        assert tuple(counts[lowering][op] for op in ("cat", "add", "conv")) == expected
    # Between the groups a max-pool comes before the NCReLU; elsewhere a convolution emits both halves.
    mirrored = [node.name for node in lower(net, "mirror").graph.nodes if node.op == "cat"]
    assert mirrored == ["group1.block0.ncrelu.mirror", "group2.block0.ncrelu.mirror"]
    assert not [node.name for node in net.graph.nodes if "mirror" in node.name]  # the argument is as it was


@pytest.mark.parametrize("nonlinearity", ["ncrelu", "relu"])
def test_no_lowering_is_another_one_under_a_second_name(plain, nonlinearity):
    net = plain(depth=16, nonlinearity=nonlinearity)
    distinct = distinct_lowerings(net)
    forms = {lowering: [*map(str, layers_and_weights(lower(net, lowering)))] for lowering in LOWERINGS}
    pairs = itertools.combinations(distinct, 2)
    assert not [pair for pair in pairs if forms[pair[0]] == forms[pair[1]]]
    assert all(forms[lowering] == forms["concat"] for lowering in LOWERINGS if lowering not in distinct)


@pytest.mark.parametrize("nonlinearity", ["ncrelu", "relu"])
def test_skip_takes_delta_out_of_the_filters(plain, nonlinearity):
    net = plain(depth=16, nonlinearity=nonlinearity)
    folded, lowered = convolutions(net), convolutions(lower(net, "skip"))
    for name in folded.keys() - lowered.keys():
        weight, delta = lowered[f"{name}.body.conv"], dirac_delta(folded[name].shape).bool()
        assert weight[delta].abs().mean() < folded[name][delta].abs().mean() / 5
        assert weight.abs().amax(dim=(1, 2, 3)).median() < 1  # of δ's own, which is beside it


def test_skip_leaves_filters_whole_where_delta_does_not_dominate(make_net):
    net = fold(make_net(parameterization="plain", depth=16))
    assert not lower(net, "skip").graph.count("add")


def test_skip_stands_a_negative_and_a_vanishing_tap(plain, images):
    net = plain(depth=16)
    weight = net.graph["group1.block1.conv"].tensors["weight"]
    delta = dirac_delta(weight.shape)
    weight[0] -= 2 * (weight[0] * delta[0]).sum() * delta[0]
    weight[1] *= 1 - delta[1]
    pixels = torch.from_numpy(images())
    before, after = net(pixels), lower(net, "skip")(pixels)
    assert (before - after).abs().max() <= TOLERANCE * before.abs().max()


def test_an_unknown_lowering_is_refused(plain):
    with pytest.raises(Refusal, match=r"lowering must be one of concat, shared, .*, got fast"):
        lower(plain(), "fast")


def dominated(*layers):
    """Layers whose filters are δ and little else."""
    net = nn.Sequential(*layers)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            with torch.no_grad():
                layer.weight.mul_(0.1).add_(3 * dirac_delta(layer.weight.shape))
    return fold(net.eval())


def conv(num_in, num_out, **how):
    return nn.Conv2d(num_in, num_out, 3, padding=1, **how)


def head(num_in, size=1):
    return nn.AdaptiveAvgPool2d(size) if size == 1 else nn.MaxPool2d(2), nn.Flatten(), nn.Linear(num_in * size**2, 3)


# A chain beyond those of this project, and how many convolutions skip leaves without δ.
CHAINS = {
    "an NCReLU that a pool reads": ([conv(4, 4), NCReLU(), nn.MaxPool2d(2), conv(8, 4), *head(4)], 1),
    "two halves without an NCReLU": ([conv(4, 8), nn.ReLU(), conv(8, 4), nn.ReLU(), *head(4)], 1),
    "a matrix of pixels": ([conv(4, 4), nn.ReLU(), *head(4, size=2)], 1),
    "no matrix": ([conv(4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()], 0),
    "groups": ([conv(4, 4), nn.ReLU(), conv(4, 4, groups=2), nn.ReLU(), *head(4)], 0),
    "groups before an NCReLU": ([conv(4, 4, groups=2), NCReLU(), conv(8, 4), nn.ReLU(), *head(4)], 1),
    "a scale for each channel before an NCReLU": (
        [conv(4, 4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4, groups=4), NCReLU(), conv(8, 4), nn.ReLU(), *head(4)],
        1,
    ),
    "a gap": ([conv(4, 4, dilation=2), nn.ReLU(), *head(4)], 0),
    "a residual": (
        [conv(4, 4), nn.ReLU(), Residual(nn.Sequential(conv(4, 4), NCReLU(), conv(8, 4)), nn.Sequential()), *head(4)],
        0,
    ),
}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", CHAINS)
def test_other_chains_keep_their_outputs(name, lowering):
    torch.manual_seed(0)
    layers, without_delta = CHAINS[name]
    net, x = dominated(*layers), torch.randn(2, 4, 4, 4).double()
    assert distinct_lowerings(net) == (LOWERINGS if net.graph.count("ncrelu") else ("concat", "skip"))
    lowered = lower(net, lowering)
    assert (net(x) - lowered(x)).abs().max() <= TOLERANCE * net(x).abs().max()
    if lowering == "skip":
        assert lowered.graph.count("add") - net.graph.count("add") == without_delta


@pytest.mark.parametrize("net", [Sum(small_conv(), small_conv(size=1)), nn.Sequential(nn.Tanh(), small_conv())])
def test_lowerings_of_chains_are_refused_for_other_nets(net):
    plain = fold(nn.Sequential(nn.ReLU(), net, nn.Tanh()).eval())
    assert distinct_lowerings(plain) == ("concat",)
    for lowering in ("mirror", "skip"):
        with pytest.raises(Refusal, match=f"lowering {lowering} is for chains of .* choose one of concat"):
            lower(plain, lowering)


def test_skip_takes_a_chain_of_any_length():
    weight = {"weight": 3 * dirac_delta((4, 4, 3, 3)).double(), "bias": torch.zeros(4).double()}
    how = {"stride": [1, 1], "padding": [[1, 1], [1, 1]], "dilation": [1, 1], "groups": 1}
    relus = [Node(f"r{index + 1}", "relu", (f"r{index}",)) for index in range(2_000)]
    nodes = (
        Node("x", "input"),
        Node("r0", "conv", ("x",), how, weight),
        *relus,
        Node("last", "conv", ("r2000",), how, weight),
    )
    net, x = GraphNet(Graph(nodes)), torch.randn(1, 4, 4, 4).double()
    lowered = lower(net, "skip")
    assert lowered.graph.count("add") == 1
    assert (net(x) - lowered(x)).abs().max() <= TOLERANCE * net(x).abs().max()
