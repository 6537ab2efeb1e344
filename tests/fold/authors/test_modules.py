"""Single modules of the authors' diracconv.py, from a state dict that has more in it."""

import re

import numpy as np
import pytest
import reference
import torch

from common.refusal import Refusal
from fold.authors.nets import dirac_layer


def module_of(shape, *, form="repeated", each=(), bias=True, prefix="features.3.", seed=0):
    """A state dict with one module in it; `each` names the factors that have a number for every output."""
    rng = torch.Generator().manual_seed(seed)
    state = {
        "alpha": torch.randn(shape[0] if "alpha" in each else 1, generator=rng),
        "beta": torch.randn(shape[0] if "beta" in each else 1, generator=rng),
        "delta": torch.from_numpy(reference.delta(shape, form)).float(),
        "weight": torch.randn(shape, generator=rng),
    }
    state |= {"bias": torch.randn(shape[0], generator=rng)} if bias else {}
    return {prefix + name: value for name, value in state.items()} | {"features.4.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 8, 3), {}),
        ((8, 4, 3, 3), {"bias": False}),
        ((8, 4, 3, 3), {"form": "first", "each": ("alpha", "beta")}),
        ((16, 3, 3, 3), {"form": "first", "each": ("alpha", "beta")}),  # torch.nn.init.dirac_ takes any shape
        ((4, 4, 5, 5), {"each": ("beta",)}),
        ((4, 2, 3, 3, 3), {}),
        ((4, 4, 2, 2), {}),
    ],
)
def test_a_module_answers_as_theirs(shape, options):
    state = module_of(shape, **options)
    layer = dirac_layer(state, "features.3", padding=1)
    numbers = {name.rpartition(".")[2]: value.double().numpy() for name, value in state.items() if "features.3" in name}
    weight = reference.folded_weight(
        numbers["alpha"], numbers["beta"], numbers["weight"], form=options.get("form", "repeated")
    )
    x = np.random.default_rng(0).standard_normal((2, shape[1], *(6,) * (len(shape) - 2)))
    expected = reference.convolve(x, weight, 1)
    if "bias" in numbers:
        expected = expected + numbers["bias"].reshape(-1, *(1,) * (len(shape) - 2))
    with torch.no_grad():
        actual = layer.double()(torch.from_numpy(x))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_a_layer_has_numbers_of_its_own_and_learns():
    state = module_of((4, 8, 3, 3), prefix="")
    layer = dirac_layer(state)
    with torch.no_grad():
        layer.weight.zero_()
        layer.a.zero_()
    assert state["weight"].abs().sum() > 0
    assert state["alpha"] != 0
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {
        "a",
        "b",
        "weight",
        "bias",
    }


def changed(**tensors):
    return module_of((4, 8, 3, 3)) | {f"features.3.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "features.3.alpha, features.3.beta, features.3.delta, features.3.weight missing"),
        (changed(weight=torch.zeros(4, 8)), "features.3.weight is [4, 8]: a convolution has 3 to 5 dimensions"),
        (changed(alpha=torch.zeros(3)), "features.3.alpha is [3] beside features.3.weight of [4, 8, 3, 3]"),
        (changed(bias=torch.zeros(5)), "features.3.bias is [5] beside"),
        (changed(delta=torch.zeros(4, 8, 3)), "features.3.delta is [4, 8, 3] beside"),
        (changed(delta=torch.ones(4, 8, 3, 3)), "features.3.delta is neither the repeated δ"),
        (changed(beta=torch.tensor([float("nan")])), "features.3.beta holds NaN or infinite values"),
        (changed(alpha=torch.zeros(4)), "features.3.alpha has 4 numbers and features.3.beta one"),
    ],
)
def test_a_module_that_is_none_is_refused_by_the_tensor_s_name(state, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        dirac_layer(state, "features.3")
