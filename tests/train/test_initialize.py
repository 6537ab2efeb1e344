"""Ordinary convolutions that start as a Dirac net: the same function with one seed, and nothing but W to learn."""

import numpy as np
import pytest
import reference
import torch

from common.refusal import Refusal
from train.families import build, count_parameters, initialized
from train.layers import DiracConv2d

START = {"a": 5.0, "b": 0.1, "std": 0.3}


def started(spec, **start):
    torch.manual_seed(3)
    return initialized(spec, **START, **start)


@pytest.mark.parametrize("fields", [{}, {"nonlinearity": "relu"}, {"delta": "first"}, {"family": "pooled", "size": 13}])
@pytest.mark.parametrize("start", ["pytorch", "authors"])
def test_both_are_the_same_function_at_the_start(make_spec, images, fields, start):
    dirac, ordinary = (
        started(make_spec(**fields, parameterization=name), start=start) for name in ("dirac", "initialised")
    )
    pixels = torch.from_numpy(images(size=fields.get("size", 8)))
    for mode in (True, False):  # batch statistics, and those that start at 0 and 1
        assert torch.equal(dirac.train(mode)(pixels), ordinary.train(mode)(pixels))


def test_the_filters_are_a_delta_and_b_w_norm(make_spec):
    dirac, ordinary = (started(make_spec(parameterization=name)) for name in ("dirac", "initialised"))
    layers = [(name, layer) for name, layer in dirac.named_modules() if isinstance(layer, DiracConv2d)]
    assert layers
    for name, layer in layers:
        expected = reference.folded_weight(5.0, 0.1, layer.weight.detach().double().numpy())
        np.testing.assert_allclose(ordinary.get_submodule(name).weight.detach().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_nothing_but_ordinary_layers_is_learnt(make_spec):
    ordinary, plain = (build(make_spec(parameterization=name)) for name in ("initialised", "plain"))
    assert list(ordinary.state_dict()) == list(plain.state_dict())
    assert count_parameters(ordinary) == count_parameters(plain)
    assert make_spec(parameterization="initialised").name == "Plain-10-0.25"


def test_a_residual_net_has_no_such_start(make_spec):
    with pytest.raises(Refusal, match="family wrn requires nonlinearity relu and parameterization plain or delta"):
        build(make_spec(family="wrn", width=1.0, nonlinearity="relu", parameterization="initialised"))
