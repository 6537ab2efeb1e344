import pytest
import torch

from bench.nets import ReferenceDiracConv2d
from bench.training_steps import digits_spec, make_net, make_step, make_weights
from train.layers import DiracConv2d

SMALL = digits_spec(10, 0.25, side=8)


def dirac_layers(net):
    return [layer for layer in net.modules() if isinstance(layer, DiracConv2d)]


@pytest.mark.parametrize("channels", [(8, 4), (4, 8)])
def test_the_references_weight_and_gradients_are_ours(channels):
    torch.manual_seed(0)
    ours, reference = (kind(*channels, 3).double() for kind in (DiracConv2d, ReferenceDiracConv2d))
    reference.load_state_dict(ours.state_dict())
    gradient = torch.randn_like(ours.weight)
    for layer in (ours, reference):
        layer.folded_weight().backward(gradient)
    torch.testing.assert_close(reference.folded_weight(), ours.folded_weight(), rtol=0, atol=1e-13)
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-13)


def test_the_optimizer_trains_the_references_own_parameters():
    net = make_net("Dirac, reference", SMALL)
    assert {type(layer) for layer in dirac_layers(net)} == {ReferenceDiracConv2d}
    before = [parameter.clone() for parameter in net.parameters()]
    make_step(net, SMALL.image, 4)()
    assert not any(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


@pytest.mark.slow
def test_the_forms_start_alike_and_learn_alike():
    """All forms of the Dirac net compute the same; the ordinary net is another one."""
    sums = {}
    for form in ("Dirac", "Dirac, reference", "ordinary"):
        step = make_step(make_net(form, SMALL), SMALL.image, 4)
        sums[form] = torch.stack([step() for _ in range(3)])[:, 0]
    torch.testing.assert_close(sums["Dirac, reference"], sums["Dirac"], rtol=1e-5, atol=0)
    assert not dirac_layers(make_net("ordinary", SMALL))
    assert torch.isfinite(sums["ordinary"]).all()


def test_weights_alone_leave_no_gradients_behind():
    make_weights("Dirac", SMALL)()
