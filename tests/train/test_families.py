import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import reference
import torch
from rows import ROWS

from common.refusal import Refusal
from common.spec import Family
from train.families import REDUCTION, build, count_parameters, outline

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"depth": 34, "width": 2}, 3_693_158),
        ({"depth": 34, "width": 8}, 59_009_222),
        ({"family": "imagenet", "depth": 18, "width": 0.75}, 12_756_600),
        # As the authors' notebook prints it.
        ({"family": "imagenet", "depth": 18, "width": 0.75, "parameterization": "per-output-b"}, 12_759_464),
        ({"family": "imagenet", "depth": 34, "width": 0.5}, 10_812_488),
        ({"family": "imagenet", "depth": 34, "width": 0.75}, 24_125_528),
        # Table 3 prints 15.5M and 34.8M.
        ({"family": "imagenet-table3", "depth": 34, "width": 0.5}, 15_533_136),
        ({"family": "imagenet-table3", "depth": 34, "width": 0.75}, 34_745_440),
        # Table 2 prints 36.5M; 8.9M is Wide ResNet 40-4's published figure.
        ({"family": "wrn", "depth": 28, "width": 10}, 36_479_194),
        ({"family": "wrn", "depth": 40, "width": 4}, 8_949_210),
    ],
)
def test_parameter_counts_are_those_of_the_paper_and_the_authors_code(make_spec, fields, expected):
    imagenet = fields.get("family", "").startswith("imagenet")
    fields |= {"size": 224, "num_labels": 1000} if imagenet else {"size": 32}
    if fields.get("family") == "wrn":
        fields |= {"nonlinearity": "relu", "parameterization": "plain"}
    assert count_parameters(outline(make_spec(**fields))) == expected


def test_an_outline_is_the_net_without_numbers(make_spec, row):
    net, shapes = build(make_spec(**row)), outline(make_spec(**row))
    assert str(net) == str(shapes)
    tensors = shapes.state_dict()
    assert {name: tensor.shape for name, tensor in net.state_dict().items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert all(tensor.is_meta for tensor in tensors.values())


@pytest.mark.slow
def test_neither_an_outline_nor_a_plain_one_imports_pytorchs_compiler():
    """It takes over a second, at every load of a plain net."""
    program = """
import sys
from fold.plain import skeleton
from train.data.datasets import cifar_image
from common.spec import Spec
skeleton(Spec("cifar", 10, 1.0, "ncrelu", cifar_image(), ("one", "other")))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_every_family_that_can_be_asked_for_is_among_the_rows():
    assert {row.get("family", "cifar") for row in ROWS.values()} == set(get_args(Family))


@pytest.mark.parametrize("family", get_args(Family))
def test_the_smallest_images_that_a_family_takes_reach_its_end(make_net, make_spec, images, family):
    fields = next(row for row in ROWS.values() if row.get("family", "cifar") == family)
    smallest = REDUCTION[family]
    assert make_net(**fields | {"size": smallest})(torch.from_numpy(images(2, smallest))).shape == (2, 10)
    with pytest.raises(Refusal, match=f"at least {smallest}x{smallest} pixels"):
        build(make_spec(**fields | {"size": smallest - 1}))


def test_every_family_is_the_papers_in_float64(make_net, make_spec, images, row):
    net = make_net(**row).double()
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    pixels = images(2, row.get("size", 8))
    expected = reference.Net(state, make_spec(**row))(pixels)
    logits = net(torch.from_numpy(pixels)).detach().numpy()
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
    with pytest.raises(Refusal, match="at least 32x32 pixels, got 31x31"):
        build(make_spec(family="imagenet", depth=18, size=31))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "vgg"}, rf"family must be one of {', '.join(get_args(Family))}, got vgg"),
        ({"family": "imagenet", "depth": 16, "size": 32}, "depth must be 18 or 34 for imagenet, got 16"),
        ({"family": "imagenet-table3", "depth": 18, "size": 32}, "depth must be 34 for imagenet-table3, got 18"),
        ({"parameterization": "per-channel"}, "per-channel a and b require nonlinearity relu"),
        ({"family": "wrn"}, "family wrn requires nonlinearity relu and parameterization plain or delta"),
    ],
)
def test_what_a_family_does_not_have_is_refused(make_spec, fields, message):
    with pytest.raises(Refusal, match=message):
        build(make_spec(**fields))
