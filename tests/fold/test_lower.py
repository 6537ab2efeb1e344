"""Lowerings: other layers, the same logits, in float64 and for every family."""

import itertools

import pytest
import torch
from torch import nn

from common.refusal import Refusal
from fold.lower import Mirror, SharedReLU, distinct_lowerings, lower
from fold.lowerings import LOWERINGS
from fold.plain import fold_net, named_layers
from train.layers import NCReLU, Residual, dirac_delta

TOLERANCE = 1e-12  # float64, as a share of the largest output


def outputs(net, images):
    """Every layer's output by name."""
    found, x = {}, images
    with torch.no_grad():
        for name, layer in named_layers(net):
            x = found[name] = layer(x)
    return found


def layers_and_weights(net):
    """What a net computes, as text: its layers and the sum of every tensor."""
    yield net
    yield from (tensor.sum() for tensor in net.state_dict().values())


def kinds(net):
    return {type(layer) for layer in net.modules()}


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
        return fold_net(net)

    return make


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_logits_stay_in_float64(make_net, images, row, lowering):
    net, pixels = fold_net(make_net(**row)), torch.from_numpy(images(3, row.get("size", 8)))
    with torch.no_grad():
        before, after = net(pixels), lower(net, lowering)(pixels)
    error = ((before - after).abs().max() / before.abs().max()).item()
    assert error <= TOLERANCE, f"{lowering} is off by {error:.1e} of the logits: fold/lower.py"


@pytest.mark.parametrize("nonlinearity", ["ncrelu", "relu"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_layers_keep_their_names_and_outputs(plain, images, lowering, nonlinearity):
    net = plain(depth=16, nonlinearity=nonlinearity)
    before, after = (outputs(form, torch.from_numpy(images())) for form in (net, lower(net, lowering)))
    convolutions = [name for name, layer in named_layers(net) if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 13
    for name in convolutions:
        expected, found = before[name], after[name][:, : before[name].shape[1]]
        if lowering == "skip":  # up to a positive factor for every channel
            factor = (expected * found).sum(dim=(0, 2, 3)) / (found * found).sum(dim=(0, 2, 3))
            assert (factor > 0).all()
            found = found * factor.view(-1, 1, 1)
        assert (expected - found).abs().max() <= TOLERANCE * expected.abs().max(), name


def test_each_lowering_has_the_layers_that_its_name_promises(plain):
    net = plain(depth=16)
    forms = {lowering: lower(net, lowering) for lowering in LOWERINGS}
    assert NCReLU in kinds(forms["concat"])
    assert SharedReLU in kinds(forms["shared"])
    assert Residual not in kinds(forms["shared"])
    for lowering in ("shared", "shared-split", "split", "mirror"):
        assert NCReLU not in kinds(forms[lowering])
    assert Residual in kinds(forms["split"])
    # Between the groups a max-pool comes before the NCReLU; elsewhere a convolution emits both halves.
    assert sum(isinstance(layer, Mirror) for layer in forms["mirror"].modules()) == 2
    assert sum(isinstance(layer, Residual) for layer in forms["skip"].modules()) == 12
    assert not [name for name, _ in named_layers(net) if "mirror" in name]  # the argument is as it was


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
    folded = {name: layer.weight for name, layer in named_layers(net) if isinstance(layer, nn.Conv2d)}
    for name, layer in named_layers(lower(net, "skip")):
        if not isinstance(layer, Residual):
            continue
        weight, delta = layer.body.conv.weight, dirac_delta(folded[name].shape).bool()
        assert weight[delta].abs().mean() < folded[name][delta].abs().mean() / 5
        assert weight.abs().amax(dim=(1, 2, 3)).median() < 1  # of δ's own, which is beside it


def test_skip_leaves_filters_whole_where_delta_does_not_dominate(make_net):
    net = fold_net(make_net(parameterization="plain", depth=16))
    assert Residual not in kinds(lower(net, "skip"))


def test_skip_stands_a_negative_and_a_vanishing_tap(plain, images):
    net = plain(depth=16)
    conv = net.group1.block1.conv
    with torch.no_grad():
        delta = dirac_delta(conv.weight.shape)
        conv.weight[0] -= 2 * (conv.weight[0] * delta[0]).sum() * delta[0]
        conv.weight[1] *= 1 - delta[1]
        pixels = torch.from_numpy(images())
        before, after = net(pixels), lower(net, "skip")(pixels)
    assert (before - after).abs().max() <= TOLERANCE * before.abs().max()


def test_an_unknown_lowering_is_refused(plain):
    with pytest.raises(Refusal, match=r"lowering must be one of concat, shared, .*, got fast"):
        lower(plain(), "fast")


@pytest.mark.parametrize("lowering", ["shared", "shared-split", "split", "mirror"])
def test_what_is_no_convolution_after_an_ncrelu_is_refused(lowering):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), NCReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 1, 1))
    with pytest.raises(TypeError, match="2: MaxPool2d after an NCReLU can only be written as concat"):
        lower(net, lowering)
