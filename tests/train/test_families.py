import numpy as np
import pytest
import reference
import torch

from train.families import build, count_parameters
from train.refusal import Refusal


@pytest.mark.parametrize(("depth", "width", "expected"), [(34, 2, 3_693_158), (34, 8, 59_009_222)])
def test_parameter_counts_are_those_of_the_authors_code(make_spec, depth, width, expected):
    with torch.device("meta"):
        assert count_parameters(build(make_spec(depth=depth, width=width, size=32))) == expected


@pytest.mark.parametrize("nonlinearity", ["ncrelu", "relu"])
def test_the_net_is_table_1_in_float64(make_net, make_spec, images, nonlinearity):
    net = make_net(nonlinearity=nonlinearity).double()
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    expected = reference.dirac_net(state, make_spec(nonlinearity=nonlinearity), images())
    logits = net(torch.from_numpy(images())).detach().numpy()
    # Normalize's buffers are float32 numbers, which moves its output by 1e-7.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("width", [0.0625, 0.3, 0.75, 1.3])
def test_any_width_builds_with_channels_that_are_multiples(make_spec, images, width):
    assert build(make_spec(width=width)).eval()(torch.from_numpy(images())).shape == (4, 10)


@pytest.mark.parametrize("depth", [-2, 4, 11, 20, 33])
def test_a_depth_that_is_not_6n_plus_4_is_refused(make_spec, depth):
    with pytest.raises(Refusal, match=rf"^depth must be 6N \+ 4 \(10, 16, 22, 28, 34, ...\), got {depth}$"):
        build(make_spec(depth=depth))


def test_a_width_without_a_channel_and_images_that_pool_away_are_refused(make_spec):
    with pytest.raises(Refusal, match="width must be at least 1/16"):
        build(make_spec(width=0.05))
    with pytest.raises(Refusal, match="at least 4x4 pixels, got 3x3"):
        build(make_spec(size=3))
