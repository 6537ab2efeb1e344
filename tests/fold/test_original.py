"""Files in the authors' two published layouts, and their forward pass written once more from its description."""

import os
import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from fold.original import OriginalConfig, command, import_original
from fold.plain import fold_net
from fold.run import FoldConfig
from fold.run import command as fold
from train.checkpoint import load_checkpoint, load_net
from train.cli import run_command
from train.refusal import Refusal

GROUPS = {"cifar": (2, 2, 2), "imagenet": (4, 4, 4, 4), "imagenet-table3": (6, 8, 12, 10)}


def authors_file(release, family, *, base=4, num_classes=10, seed=0):
    """What torch.save was given: params, and in the first release stats."""
    rng = torch.Generator().manual_seed(seed)
    ncrelu = 2 if release == 1 else 1
    params, stats = {}, {}

    def random(*shape):
        return torch.randn(*shape, generator=rng)

    def add_batch_norm(name, num):
        params[f"{name}.weight"], params[f"{name}.bias"] = random(num), random(num)
        where = stats if release == 1 else params
        where[f"{name}.running_mean"], where[f"{name}.running_var"] = random(num), random(num).abs() + 0.5

    size = 3 if family == "cifar" else 7
    params["conv"] = random(base, 3, size, size)
    add_batch_norm("bn", base)
    num_in = base
    for group, num_blocks in enumerate(GROUPS[family]):
        num_out = base * 2**group
        for block in range(num_blocks):
            name = f"group{group}.block{block}"
            params[f"{name}.conv"] = 0.1 * random(num_out, ncrelu * num_in, 3, 3)
            scales = 1 if release == 1 else num_out
            params[f"{name}.alpha"], params[f"{name}.beta"] = 1 + random(scales), random(scales)
            add_batch_norm(f"{name}.bn", num_out)
            stats[f"eye{num_out}_{num_in}_3_3"] = torch.ones(1)
            num_in = num_out
    params["fc.weight"], params["fc.bias"] = random(num_classes, num_in), random(num_classes)
    return {"params": params, "stats": stats, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


def authors_forward(content, family, images):
    """Both releases in float64 from the description of their code."""
    numbers = {name: value.double() for part in ("params", "stats") for name, value in content[part].items()}
    first_release = numbers["group0.block0.alpha"].numel() == 1
    mean, std = (
        ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7])
        if family == "cifar"
        else ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    )
    x = (images.double() - torch.tensor(mean)) / torch.tensor(std)
    x = x.permute(0, 3, 1, 2)

    def batch_norm(x, name):
        parts = (numbers[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *parts)

    def eye(num_out, num_in):
        square = torch.eye(min(num_out, num_in), dtype=torch.float64)
        return square.repeat(max(num_out // num_in, 1), max(num_in // num_out, 1))

    if family == "cifar":
        x = functional.conv2d(x, numbers["conv"], padding=1)
        x = batch_norm(x, "bn").relu()
    else:
        x = functional.conv2d(x, numbers["conv"], stride=2, padding=3)
        x = functional.max_pool2d(batch_norm(x, "bn"), 3, 2, 1)
    for group, num_blocks in enumerate(GROUPS[family]):
        if group:
            x = functional.max_pool2d(x, 2)
        for block in range(num_blocks):
            name = f"group{group}.block{block}"
            w = numbers[f"{name}.conv"]
            alpha, beta = (numbers[f"{name}.{part}"].view(-1, 1, 1, 1) for part in ("alpha", "beta"))
            delta = torch.zeros_like(w)
            delta[:, :, 1, 1] = eye(*w.shape[:2])
            w = beta * functional.normalize(w.view(len(w), -1)).view_as(w) + alpha * delta
            activations = torch.cat([x.clamp(min=0), x.clamp(max=0)], 1) if first_release else x.relu()
            x = batch_norm(functional.conv2d(activations, w, padding=1), f"{name}.bn")
    x = x if first_release else x.relu()
    return functional.linear(x.mean((2, 3)), numbers["fc.weight"], numbers["fc.bias"])


@pytest.mark.parametrize("release", [1, 2])
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
    content = authors_file(release, family, num_classes=num_classes)
    torch.save(content, tmp_path / "model.pt7", _use_new_zipfile_serialization=release == 2)
    checkpoint = import_original(tmp_path / "model.pt7", image_size=None if family == "cifar" else 64)
    spec = checkpoint.spec
    assert (spec.family, spec.depth) == (family, depth)
    assert spec.width == 4 / (16 if family == "cifar" else 64)
    assert (spec.labels[0], spec.labels[-1], len(spec.labels)) == (*labels, num_classes)
    size = spec.image.height
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8))
    expected = authors_forward(content, family, images)
    net = load_net(checkpoint)
    with torch.no_grad():
        # Normalize's buffers are float32 numbers, which moves its output by 1e-7; both nets see the same one.
        folded = fold_net(net)(images)
        actual = net.double()(images)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.abs().max())
    np.testing.assert_allclose(folded, actual, rtol=0, atol=1e-12 * expected.abs().max())


def test_the_command_writes_a_checkpoint_that_folds_like_any_other(tmp_path, capsys):
    torch.save(authors_file(1, "cifar"), tmp_path / "model.pt7")
    out = tmp_path / "checkpoint.pt"
    assert run_command(command, OriginalConfig, argv=[str(tmp_path / "model.pt7"), "--out", str(out)]) == 0
    assert "DiracNet-10-0.25, cifar, ncrelu, dirac, 10 classes" in capsys.readouterr().out
    assert load_checkpoint(out).config["dataset"] == "cifar10"
    assert run_command(fold, FoldConfig, argv=[str(out)]) == 0
    assert (tmp_path / "plain.safetensors").exists()


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_anything_else_in_it_is_refused_and_not_executed(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    content = authors_file(1, "cifar") | {"extra": _Evil()}
    torch.save(content, tmp_path / "model.pt7", _use_new_zipfile_serialization=zipped)
    with pytest.raises(Refusal, match="no file of tensors in plain containers"):
        import_original(tmp_path / "model.pt7")
    assert not (tmp_path / "executed").exists()


def _without(content, *names):
    return content | {"params": {name: value for name, value in content["params"].items() if name not in names}}


def _with(content, **parts):
    return content | {"params": content["params"] | parts}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [1, 2], "has no dictionary `params`"),
        (lambda content: {"stats": content["stats"]}, "has no dictionary `params`"),
        (lambda content: _without(content, "conv", "fc.weight"), "conv, fc.weight missing"),
        (lambda content: _with(content, note="text"), "note: no tensors of finite real numbers"),
        (lambda content: _with(content, conv=torch.full((4, 3, 3, 3), float("nan"))), "conv: no tensors of finite"),
        (lambda content: _with(content, conv=torch.ones(4, 3, 3, 3, dtype=torch.complex64)), "conv: no tensors of"),
        (lambda content: _with(content, **{"fc.weight": torch.tensor(1.0)}), "the classifier ()"),
        (lambda content: _with(content, conv=torch.zeros(4, 3, 5, 5)), "the first convolution is (4, 3, 5, 5)"),
        (lambda content: _without(content, "group2.block1.conv"), "three equal groups, found (2, 2, 1)"),
        (lambda content: _without(content, "group1.block0.bn.weight"), "do not fit its spec"),
        (
            lambda content: _with(content, **{"group0.block0.alpha": torch.ones(4)}),
            "NCReLU goes with scalar alpha and beta",
        ),
    ],
)
def test_an_unknown_layout_is_refused_with_what_is_unknown(tmp_path, change, message):
    torch.save(change(authors_file(1, "cifar")), tmp_path / "model.pt7")
    with pytest.raises(Refusal, match=re.escape(message)):
        import_original(tmp_path / "model.pt7")


def test_the_authors_file_is_never_overwritten(tmp_path, capsys):
    path = tmp_path / "model.pt7"
    torch.save(authors_file(1, "cifar"), path)
    before = path.read_bytes()
    assert run_command(command, OriginalConfig, argv=[str(path), "--out", str(path)]) == 2
    assert "is the authors' file itself" in capsys.readouterr().err
    assert path.read_bytes() == before
