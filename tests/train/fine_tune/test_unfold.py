"""A plain net opened again: held against the paper's equations in NumPy, and against the fold."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch

from common.refusal import Refusal
from fold.graph import GraphNet, fold
from fold.plain import skeleton
from train.fine_tune.unfold import ABOVE_SMALLEST, as_plain, parts_of, unfold
from train.layers import dirac_delta

START = {"a": 1.5, "b": 0.15, "std": 0.03}
# Some hundred roundings of 2^-53 for each number.
TOLERANCE = 1e-12


AWKWARD = (
    lambda v, one: 0 * v,
    lambda v, one: 0.3 * one,
    lambda v, one: -v - 2 * one,
    lambda v, one: v * (1 - one),
)


def tensors(net):
    """Of a plain file, in float32 as it stands there."""
    return {name: tensor.float() for name, tensor in plain_tensors(net).items()}


def plain_tensors(net):
    return {name: tensor for name, tensor in fold(net).graph.tensors().items() if not name.startswith("normalize.")}


def awkward(weights, spec):
    """The same with filters of zeros, of δ alone, of δ with a minus, orthogonal to δ, and of tiny numbers."""
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    name = "group0.block1.conv.weight"
    if spec.family == "wrn":
        return weights
    filters = weights[name]
    delta = dirac_delta(filters.shape, spec.delta)
    for change, index in zip(AWKWARD, range(len(filters)), strict=False):
        filters[index] = change(filters[index], delta[index])
    weights["group2.block1.conv.weight"][1] *= 1e-12
    return weights


# Of the pixels' normalisation, whose constants are float32 elsewhere.
OFFSET = torch.full((3, 1, 1), 255 * 0.4, dtype=torch.float64)
SCALE = torch.full((3, 1, 1), 1 / (255 * 0.3), dtype=torch.float64)


def exact(net):
    """With the pixels' normalisation in float64 too."""
    net.normalize.offset, net.normalize.scale = OFFSET, SCALE
    return net


def answers_of_plain(weights, spec, images):
    """By the fold's own plain net, in float64."""
    given = {name: tensor.double() for name, tensor in weights.items()}
    graph = skeleton(spec).with_tensors({**given, "normalize.offset": OFFSET, "normalize.scale": SCALE})
    return GraphNet(graph)(torch.from_numpy(images)).numpy()


def test_the_opened_net_is_the_plain_one_by_the_papers_equations(make_net, make_spec, images, row):
    """Every family and form, with filters that are hard to open: NumPy and plain loops against the fold's plain net."""
    spec, pixels = make_spec(**row), images(3, row.get("size", 8))
    weights = awkward(tensors(make_net(**row)), spec)
    net = exact(unfold(weights, spec, **START))
    expected = answers_of_plain(weights, spec, pixels)
    state = {name: tensor.detach().numpy() for name, tensor in net.state_dict().items()}
    scale = np.abs(expected).max()
    assert np.abs(reference.Net(state, spec)(pixels) - expected).max() <= TOLERANCE * scale
    with torch.no_grad():
        assert np.abs(net(torch.from_numpy(pixels)).numpy() - expected).max() <= TOLERANCE * scale
        same = as_plain(net, weights)(torch.from_numpy(pixels)).numpy()
    assert np.abs(same - expected).max() <= TOLERANCE * scale


def test_fold_of_unfold_of_fold_is_the_fold(make_net, make_spec, row):
    weights = awkward(tensors(make_net(**row)), make_spec(**row))
    again = plain_tensors(unfold(weights, make_spec(**row), **START))
    assert again.keys() == weights.keys()
    for name, tensor in weights.items():
        error = (again[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-30)
        assert error <= TOLERANCE, f"{name} is off by {error:.1e}"


def test_a_layer_has_one_b_and_every_filter_solves_the_quadratic(make_net, make_spec):
    """‖t V - a δ‖ = b with the b that the worst angle to δ asks for, and a quarter more."""
    weights = awkward(tensors(make_net()), make_spec())
    net = unfold(weights, make_spec(), **START)
    for part in parts_of(net):
        if not hasattr(part.layer, "delta"):
            continue
        filters = weights[f"{part.name}.weight"].double().numpy()
        delta = part.layer.delta.numpy()[:, : filters.shape[1]]
        a, b = part.layer.a.item(), part.layer.b.item()
        sines = []
        for v, one, gamma in zip(filters, delta, net.get_submodule(part.norm).weight, strict=True):
            if not v.any():
                assert gamma == 0
                continue
            s = gamma.item() / np.sqrt(1 + 1e-5)
            assert np.linalg.norm(v / s - a * one) == pytest.approx(b, rel=1e-9)
            n = one.sum()
            sines.append(np.sqrt(max(0, n - (v * one).sum() ** 2 / (v**2).sum())))
        assert a == 1.5
        assert b == pytest.approx(max(ABOVE_SMALLEST * a * max(sines), 0.15), rel=1e-9)


def test_w_has_the_norm_of_the_start_and_none_where_only_zeros_are_read(make_net, make_spec):
    net = unfold(tensors(make_net()), make_spec(), **START)
    first, second = (net.get_submodule(f"group0.block{block}.conv").weight.detach() for block in (0, 1))
    assert not first[:, 4:].any()
    expected = 0.03 * np.sqrt(first[0].numel())
    for weight in (first, second):
        assert torch.allclose(weight.flatten(1).norm(dim=1), torch.tensor(expected, dtype=torch.float64))


def test_delta_has_its_least_squares_share_where_every_filter_has_a_b_of_its_own(make_net, make_spec):
    for form in ({"parameterization": "per-output-b"}, {"parameterization": "per-channel", "nonlinearity": "relu"}):
        net = make_net(**form)
        for name, layer in net.named_modules():
            if name.endswith("block1.conv"):
                layer.a.data.fill_(2.0), layer.b.data.fill_(0.5)
        spec = make_spec(**form)
        opened = unfold(tensors(net), spec, **START).get_submodule("group0.block1.conv")
        along = (opened.weight * opened.delta).sum(dim=(1, 2, 3))
        assert along.abs().max() < 1e-12  # what least squares leave is orthogonal to δ
        assert (opened.b > 0).all()


def test_tensors_that_are_not_those_of_the_spec_are_refused_by_name(make_net, make_spec):
    weights = tensors(make_net())
    for wrong, named in (
        ({name: tensor for name, tensor in weights.items() if name != "stem.conv.bias"}, r"stem\.conv\.bias"),
        ({**weights, "group0.block0.conv.weight": weights["group0.block1.conv.weight"]}, r"group0\.block0\.conv"),
        ({**weights, "strange": torch.zeros(1)}, "strange"),
    ):
        with pytest.raises(Refusal, match=rf"does not fit its spec DiracNet-10-0\.25: {named}"):
            unfold(wrong, make_spec(), **START)
    with pytest.raises(Refusal, match=r"fc\.bias.* and \d+ more"):
        unfold({}, make_spec(), **START)
    with pytest.raises(Refusal, match="--a0 and --w-std above 0, got 0"):
        unfold(weights, make_spec(), **{**START, "a": 0.0})


def test_a_bias_that_no_batch_norm_can_take_is_refused(make_net, make_spec):
    fields = {"family": "wrn", "width": 1.0, "nonlinearity": "relu", "parameterization": "plain"}
    weights = tensors(make_net(**fields))
    weights["group0.block0.sum.body.conv1.bias"] += 1
    with pytest.raises(Refusal, match=r"group0\.block0\.sum\.body\.conv1\.bias"):
        unfold(weights, make_spec(**fields), **START)


def test_the_plain_file_of_another_depth_is_refused(make_net, make_spec):
    with pytest.raises(Refusal, match=r"does not fit its spec DiracNet-16-0\.25"):
        unfold(tensors(make_net()), replace(make_spec(), depth=16), **START)


def test_parts_are_the_layers_of_a_plain_file_with_their_names(make_net, row):
    net = make_net(**row)
    plain = [name for name, tensor in plain_tensors(net).items() if tensor.dim() == 4]
    assert [f"{part.name}.weight" for part in parts_of(net)] == plain
