"""Nets as the authors trained them, against their forward pass written once more in `reference.AuthorsNet`."""

import re

import numpy as np
import pytest
import reference
import torch
from authors import optimizer_state, pickled, trained
from torch.nn import functional

from common.files import sha256
from common.refusal import Refusal
from fold.authors.files import read_saved
from fold.authors.nets import checkpoint_of
from fold.graph import fold
from fold.plain import skeleton, stored_tensors
from train.checkpoint import load_net
from train.families import count_parameters


def saved(tmp_path, params, stats, **more):
    path = tmp_path / "model.pt7"
    path.write_bytes(pickled({"params": params, "stats": stats, **more}))
    return path


def import_net(path, image_size=None):
    content = path.read_bytes()
    return checkpoint_of(path, read_saved(path, content), sha256(content), image_size=image_size)


def images_of(spec):
    size = spec.image.height
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def assert_answers(checkpoint, numbers, release):
    """In float64, up to Normalize's float32 buffers; the fold of the net up to rounding."""
    images = images_of(checkpoint.spec)
    expected = reference.AuthorsNet(numbers, release)(images)
    net = load_net(checkpoint)
    with torch.no_grad():
        folded = fold(net)(torch.from_numpy(images))
        actual = net.double()(torch.from_numpy(images))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(folded, actual, rtol=0, atol=1e-12 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("release", ["first", "notebook", "second"])
@pytest.mark.parametrize(
    ("family", "depth", "num_classes", "labels"),
    [
        ("cifar", 10, 10, ("airplane", "truck")),
        ("cifar", 10, 100, ("apple", "worm")),
        ("imagenet", 18, 1000, ("tench", "toilet tissue")),
        ("imagenet-table3", 34, 7, ("class 0", "class 6")),
    ],
)
def test_the_authors_nets_answer_as_theirs_did_and_fold(tmp_path, release, family, depth, num_classes, labels):
    params, stats = trained(release, family, num_classes=num_classes)
    path = saved(tmp_path, params, stats, epoch=3, optimizer=optimizer_state(params))
    checkpoint = import_net(path, image_size=None if family == "cifar" else 32)
    spec = checkpoint.spec
    assert (spec.family, spec.depth) == (family, depth)
    assert spec.width == 4 / (16 if family == "cifar" else 64)
    assert (spec.labels[0], spec.labels[-1], len(spec.labels)) == (*labels, num_classes)
    assert_answers(checkpoint, params | stats, release)


@pytest.mark.slow
def test_half_precision_and_the_prefix_of_data_parallel(tmp_path):
    params, stats = ({name: value.half() for name, value in part.items()} for part in trained("first", "cifar"))
    prefixed = {f"module.{name}": value for name, value in params.items()}
    assert_answers(import_net(saved(tmp_path, prefixed, stats)), params | stats, "first")


@pytest.mark.slow
def test_the_names_of_the_first_release_s_first_days(tmp_path):
    params, stats = trained("first", "cifar")
    early = {re.sub(r"\.(alpha|beta)$", r".conv.\1", name): value for name, value in params.items()}
    assert "group0.block0.conv.alpha" in early
    assert_answers(import_net(saved(tmp_path, early, stats)), params | stats, "first")


@pytest.mark.slow
def test_one_a_and_b_for_a_layer_of_the_second_release_become_one_for_each_output(tmp_path):
    params, stats = trained("second", "cifar")
    params |= {name: value[:1].clone() for name, value in params.items() if name.endswith((".alpha", ".beta"))}
    checkpoint = import_net(saved(tmp_path, params, stats))
    assert checkpoint.spec.parameterization == "per-channel"
    assert_answers(checkpoint, params | stats, "second")


def test_an_imported_net_of_the_second_release_keeps_its_delta_in_training(tmp_path):
    """A step moves every a, and no δ that their net has not: outputs beyond the inputs stay without a one."""
    checkpoint = import_net(saved(tmp_path, *trained("second", "cifar")))
    assert checkpoint.spec.delta == "first"
    net = load_net(checkpoint).train()
    layer = net.group1.block0.conv
    before = layer.a.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    functional.cross_entropy(net(torch.from_numpy(images_of(checkpoint.spec))), torch.arange(2)).backward()
    optimizer.step()
    moved = (layer.a != before).numpy()
    np.testing.assert_array_equal(moved, np.arange(8) < 4)  # the loss does not see the other a
    expected = reference.folded_weight(
        layer.a.detach().numpy(), layer.b.detach().numpy(), layer.weight.detach().numpy(), form="first"
    )
    np.testing.assert_allclose(layer.folded_weight().detach(), expected, rtol=0, atol=1e-6)


def without(part, *names):
    return {name: value for name, value in part.items() if name not in names}


def eye(shape, form):
    return {"eye" + "_".join(map(str, shape)): torch.from_numpy(reference.delta(shape, form)).float()}


SMALLER = torch.zeros(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, s: (without(p, "conv"), s), "none of the authors' layouts: conv is missing"),
        (lambda p, s: (without(p, "fc.weight"), s), "none of the authors' layouts: fc.weight is missing"),
        (lambda p, s: (without(p, "group0.block0.alpha"), s), "group0.block0.alpha and group0.block0.beta are missing"),
        (
            lambda p, s: (without(p, "group2.block1.conv"), s),
            "DiracNet-10-0.25 of cifar: group2.block1.conv is missing",
        ),
        (lambda p, s: (without(p, "group1.block0.bn.weight"), s), "group1.block0.bn.weight is missing"),
        (lambda p, s: (p, without(s, "bn.running_var")), "bn.running_var is missing"),
        (lambda p, s: (p | {"conv": torch.zeros(5, 3, 3, 3)}, s), "conv is [5, 3, 3, 3], must be [4, 3, 3, 3]"),
        (lambda p, s: (p | {"conv": torch.zeros(4, 1, 3, 3)}, s), "conv is [4, 1, 3, 3], must be [4, 3, 3, 3]"),
        (
            lambda p, s: (p | {"group0.block0.conv": torch.zeros(4, 7, 3, 3)}, s),
            "group0.block0.conv is [4, 7, 3, 3], must be [4, 8, 3, 3]",
        ),
        (lambda p, s: (p | {"group1.block1.bn.bias": SMALLER}, s), "group1.block1.bn.bias is [7], must be [8]"),
        (lambda p, s: (p | {"group1.block1.beta": SMALLER}, s), "group1.block1.beta is [7], must be []"),
        (lambda p, s: (p | {"fc.weight": torch.zeros(10, 15)}, s), "fc.weight is [10, 15], must be [10, 16]"),
        (lambda p, s: (p | {"fc.weight": torch.zeros(9, 16)}, s), "fc.weight is [9, 16], must be [10, 16]"),
        (lambda p, s: (p | {"fc.bias": torch.zeros(11)}, s), "fc.bias is [11], must be [10]"),
        (lambda p, s: (p | {"fc.weight": torch.tensor(1.0)}, s), "fc.weight is [], must have 2 dimensions"),
        (lambda p, s: (p | {"extra": SMALLER}, s), "extra is not part of it"),
        (lambda p, s: (p | {"conv": torch.zeros(4, 3, 5, 5)}, s), "conv is [4, 3, 5, 5]: the authors' nets begin with"),
        (
            lambda p, s: (p | {f"group2.block{index}.conv": torch.zeros(16, 32, 3, 3) for index in range(2, 6)}, s),
            "groups of 2, 2, 6 convolutions: a CIFAR net has three of 2N each",
        ),
        (
            lambda p, s: (p | {"group0.block0.alpha": torch.ones(4)}, s),
            "group0.block0.alpha and beta hold 4 and 1 numbers",
        ),
        (
            lambda p, s: (p | {f"group0.block0.{name}": torch.ones(4) for name in ("alpha", "beta")}, s),
            "group0.block0.conv reads 8 channels: such a net with ncrelu is not known",
        ),
        (lambda p, s: (p, s | {"eye4_8_3_3": torch.zeros(4, 8, 3, 1)}), "eye4_8_3_3 is neither the repeated δ"),
        (lambda p, s: (p, s | {"eye8_16_3_3": torch.zeros(8, 16, 3, 3)}), "eye8_16_3_3 is neither the repeated δ"),
        (lambda p, s: (p, s | {"eye8_8_3_3": 2 * torch.ones(8, 8, 3, 3)}), "eye8_8_3_3 is neither the repeated δ"),
        (lambda p, s: (p, without(s, "eye4_8_3_3")), "eye4_8_3_3 missing: what the layers of this shape"),
        (lambda p, s: (p, s | eye((4, 8, 3, 3), "first")), "δ is of two forms: eye4_8_3_3 first"),
    ],
)
def test_what_is_nearly_a_layout_is_refused_by_the_tensor_s_name(tmp_path, change, message):
    """A net with eye8_8_3_3 among its δ: the second of a group has as many inputs as outputs after ReLU alone."""
    params, stats = trained("second" if "eye8_8" in message else "first", "cifar")
    path = saved(tmp_path, *change(params, stats))
    with pytest.raises(Refusal, match=re.escape(message)) as caught:
        import_net(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_images_of_no_pixel_are_refused(tmp_path):
    with pytest.raises(Refusal, match="cannot crop 0x0"):
        import_net(saved(tmp_path, *trained("first", "cifar")), image_size=0)


def test_a_block_missing_from_an_imagenet_net_is_named(tmp_path):
    params, stats = trained("notebook", "imagenet")
    block = [name for name in params if name.startswith("group3.block3.")]
    with pytest.raises(Refusal, match=r"DiracNet-18-0.0625 of imagenet: group3.block3.conv is missing, .* and 2 more"):
        import_net(saved(tmp_path, without(params, *block), stats))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "base", "name", "trained_numbers", "folded_numbers"),
    [
        ("notebook", 48, "DiracNet-18-0.75", 12_759_464, 12_753_640),
        ("second", 64, "DiracNet-18-1", 11_523_368, 11_511_784),
    ],
)
def test_the_published_nets_have_as_many_numbers_as_their_notebooks_print(
    tmp_path, release, base, name, trained_numbers, folded_numbers
):
    params, stats = trained(release, "imagenet", base=base, num_classes=1000)
    checkpoint = import_net(saved(tmp_path, params, stats))
    assert checkpoint.spec.name == name
    assert count_parameters(load_net(checkpoint)) == trained_numbers == sum(map(torch.numel, params.values()))
    assert sum(map(torch.numel, stored_tensors(skeleton(checkpoint.spec), checkpoint.spec).values())) == folded_numbers
