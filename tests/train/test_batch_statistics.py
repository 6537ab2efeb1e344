"""Batch statistics measured anew: what the net answers stays, and training on the same images sees no other net."""

import numpy as np
import reference
import torch

from train.fine_tune.from_plain import measure, standardize


def batches(images, size=8):
    return [torch.from_numpy(images(num, size)) for num in (3, 5)]


def test_moments_are_those_of_all_images_together(make_net, make_spec, images):
    """The first batch normalisation reads the stem's convolution, here in NumPy."""
    net, parts = make_net().double(), batches(images)
    pixels = torch.cat(parts).numpy()
    x = reference.convolve(
        ((pixels / 255 - 0.4) / 0.3).transpose(0, 3, 1, 2), net.stem.conv.weight.detach().numpy(), padding=1
    )
    mean, var = measure(net, parts)[0]["stem.bn"]
    np.testing.assert_allclose(mean, x.mean(axis=(0, 2, 3)), rtol=1e-6)  # the normalisation's constants are float32
    np.testing.assert_allclose(var, x.var(axis=(0, 2, 3)), rtol=1e-6)


def test_the_net_answers_as_before_and_in_training_mode_too(make_net, images, row):
    net, parts = make_net(**row).double(), batches(images, row.get("size", 8))
    together = torch.cat(parts)
    with torch.no_grad():
        before = net(together)
        standardize(net, measure(net, parts)[0])
        after, trained = net(together), net.train()(together)
    scale = before.abs().max()
    assert (after - before).abs().max() <= 1e-12 * scale
    # A batch's own statistics are then those that were measured.
    assert (trained - before).abs().max() <= 1e-10 * scale


def test_a_channel_that_never_changes_keeps_what_it_gives(make_net, images):
    net = make_net().double()
    net.stem.conv.weight.data[0] = 0
    parts = batches(images)
    with torch.no_grad():
        before = net(parts[0])
        standardize(net, measure(net, parts)[0])
        assert torch.isfinite(net.stem.bn.weight).all()
        assert (net(parts[0]) - before).abs().max() <= 1e-12 * before.abs().max()
