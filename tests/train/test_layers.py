import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.refusal import Refusal
from train.layers import (
    DiracConv1d,
    DiracConv2d,
    DiracConv3d,
    NCReLU,
    Normalize,
    dirac_delta,
    ncrelu,
    normalize_filters,
)

LAYERS = {1: DiracConv1d, 2: DiracConv2d, 3: DiracConv3d}


@st.composite
def shapes(draw):
    square, m = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    channels = draw(st.sampled_from([(square, square * m), (square * m, square)]))
    return (*channels, *draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))


@given(shapes())
def test_delta_is_equations_2_7_and_8(shape):
    np.testing.assert_array_equal(dirac_delta(shape).numpy(), reference.delta(shape))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolving_with_delta_changes_nothing(dims):
    layer = LAYERS[dims](4, 4, 3, padding=1)
    x = torch.randn(2, 4, *[5] * dims)
    assert torch.equal(layer._conv_forward(x, layer.delta, None), x)  # eq. 1


def test_more_inputs_sum_their_blocks_and_more_outputs_repeat_them():
    x = torch.randn(1, 6, 5, 5)
    summed = DiracConv2d(6, 2, 3, padding=1)
    assert torch.equal(summed._conv_forward(x, summed.delta, None), x[:, 0:2] + x[:, 2:4] + x[:, 4:6])  # eq. 7
    repeated = DiracConv2d(6, 12, 3, padding=1)
    assert torch.equal(repeated._conv_forward(x, repeated.delta, None), torch.cat([x, x], 1))  # eq. 8


@given(shapes(), st.floats(-5, 5), st.floats(-3, 3), st.integers(0, 99))
def test_the_layer_is_equation_4_in_float64(shape, a, b, seed):
    torch.manual_seed(seed)
    num_out, num_in, *kernel = shape
    layer = LAYERS[len(kernel)](num_in, num_out, kernel, padding=2).double()
    with torch.no_grad():
        layer.a.fill_(a)
        layer.b.fill_(b)
    x = torch.randn(2, num_in, *[6] * len(kernel), dtype=torch.float64)
    expected = reference.convolve(x.numpy(), reference.folded_weight(a, b, layer.weight.detach().numpy()), 2)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_initial_values_are_the_papers():
    layer = DiracConv2d(64, 64, 3)
    assert (layer.a.item(), layer.b.item(), layer.bias) == (5.0, pytest.approx(1e-3), None)
    assert layer.weight.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("parameterization", ["dirac", "per-output-b", "per-channel", "unnormalized", "delta"])
def test_every_parameterization_is_its_equation(parameterization):
    torch.manual_seed(0)
    layer = DiracConv2d(8, 4, 3, parameterization=parameterization).double()
    with torch.no_grad():
        for scale in (layer.a, layer.b):
            if isinstance(scale, torch.nn.Parameter):
                scale.normal_()
    a = layer.a.detach().numpy()
    b = None if layer.b is None else layer.b.detach().numpy()
    expected = reference.folded_weight(None if parameterization == "delta" else a, b, layer.weight.detach().numpy())
    np.testing.assert_allclose(layer.folded_weight().detach().numpy(), expected, rtol=0, atol=1e-13)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if name != "weight"} == {
        "dirac": {"a": (), "b": ()},
        "per-output-b": {"a": (), "b": (4,)},
        "per-channel": {"a": (4,), "b": (4,)},
        "unnormalized": {"a": ()},
        "delta": {},
    }[parameterization]


@pytest.mark.parametrize("form", ["repeated", "first"])
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (4, 8, 3, 3), (6, 6, 5), (4, 12, 3, 3, 3)])
def test_delta_has_its_ones_where_its_form_says(shape, form):
    np.testing.assert_array_equal(dirac_delta(shape, form).numpy(), reference.delta(shape, form))


def test_an_unknown_parameterization_is_refused():
    with pytest.raises(Refusal, match="no parameterization plain"):
        DiracConv2d(4, 4, 3, parameterization="plain")


def test_a_zero_filter_stays_zero_instead_of_dividing_by_zero():
    weight = torch.zeros(2, 3, 3, 3, requires_grad=True)
    normalize_filters(weight).sum().backward()
    assert torch.equal(normalize_filters(weight), weight)
    assert torch.isfinite(weight.grad).all()


def test_gradients_of_equation_4_are_right():
    layer = DiracConv2d(4, 2, 3).double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    names = ("a", "b", "weight")

    def output(*parts):
        return torch.func.functional_call(layer, dict(zip(names, parts, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, [getattr(layer, name) for name in names])


def test_all_of_a_b_and_w_are_parameters_and_delta_is_not():
    layer = DiracConv2d(4, 4, 3)
    assert {name for name, _ in layer.named_parameters()} == {"a", "b", "weight"}
    assert set(layer.state_dict()) == {"a", "b", "weight"}


def test_channels_that_are_no_multiples_are_refused():
    with pytest.raises(Refusal, match=r"multiples of each other .* got 6 and 4"):
        DiracConv2d(6, 4, 3)
    with pytest.raises(Refusal, match="one group, got 2"):
        DiracConv2d(4, 4, 3, groups=2)


@pytest.mark.parametrize("size", [(), (5,), (4, 4), (3, 4, 5)])
def test_ncrelu_is_equation_9(size):
    x = torch.randn(2, 3, *size)
    np.testing.assert_array_equal(NCReLU()(x).numpy(), reference.ncrelu(x.numpy()))


def test_at_the_start_a_layer_multiplies_by_a():
    """Eq. 11: with W of 0, δ sums the halves of NCReLU to x again."""
    layer = DiracConv2d(8, 4, 3, padding=1)
    torch.nn.init.zeros_(layer.weight)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(NCReLU()(x)), layer.a * x)


def test_ncrelu_keeps_the_layout_and_has_the_right_gradient():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert NCReLU()(x).is_contiguous(memory_format=torch.channels_last)
    assert NCReLU()(x.contiguous()).is_contiguous()
    assert torch.autograd.gradcheck(NCReLU(), x.double().requires_grad_())


def test_normalize_gives_nchw_of_the_specs_mean_and_deviation(images):
    pixels = images()
    expected = ((pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.4, 0.3]).transpose(0, 3, 1, 2)
    x = Normalize((0.1, 0.2, 0.3), (0.5, 0.4, 0.3)).double()(torch.from_numpy(pixels))
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=1e-6)  # the buffers are made in float32


@pytest.mark.slow
def test_a_compiled_ncrelu_is_whole_and_has_the_same_gradient():
    x = torch.tensor([[-1.0, 0.0, 2.0]], requires_grad=True)
    explained = torch._dynamo.explain(lambda x: ncrelu(2 * x) + 1)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    compiled = torch.compile(ncrelu, backend="aot_eager", fullgraph=True)
    weight, found = torch.arange(1.0, 7.0), []
    for function in (ncrelu, compiled):
        y = function(x)
        found.append((y, *torch.autograd.grad((weight * y).sum(), x)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
