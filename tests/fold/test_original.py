"""Files in the authors' two published layouts, and their forward pass written once more from its description."""

import os
import re

import numpy as np
import pytest
import reference
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
    """What torch.save was given: params, and in the first release stats.

    "notebook" is the first release as published: other names, a beta for each output, a last ReLU.
    """
    rng = torch.Generator().manual_seed(seed)
    ncrelu = 1 if release == 2 else 2
    params, stats = {}, {}

    def random(*shape):
        return torch.randn(*shape, generator=rng)

    def add_batch_norm(name, num):
        params[f"{name}.weight"], params[f"{name}.bias"] = random(num), random(num)
        where = params if release == 2 else stats
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
            shape = (num_out, ncrelu * num_in, 3, 3)
            alpha, beta = 1 + random(num_out if release == 2 else 1), random(1 if release == 1 else num_out)
            if release == "notebook":
                params[f"{name}.conv.gamma"], params[f"{name}.conv.beta"] = alpha, beta
            else:
                params[f"{name}.alpha"], params[f"{name}.beta"] = alpha, beta
            add_batch_norm(f"{name}.bn", num_out)
            eye = reference.delta(shape, "first" if release == 2 else "repeated")
            (params if release == 2 else stats)["eye" + "_".join(map(str, shape))] = torch.from_numpy(eye).float()
            num_in = num_out
    params["fc.weight"], params["fc.bias"] = random(num_classes, num_in), random(num_classes)
    return {"params": params, "stats": stats, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


def authors_forward(content, family, images):
    """Both releases in float64 from the description of their code."""
    numbers = {name: value.double() for part in ("params", "stats") for name, value in content[part].items()}
    notebook = "group0.block0.conv.gamma" in numbers
    scales = ("conv.gamma", "conv.beta") if notebook else ("alpha", "beta")
    first_release = numbers[f"group0.block0.{scales[0]}"].numel() == 1
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
            alpha, beta = (numbers[f"{name}.{part}"].view(-1, 1, 1, 1) for part in scales)
            delta = torch.from_numpy(reference.delta(w.shape, "repeated" if first_release else "first"))
            w = beta * functional.normalize(w.view(len(w), -1)).view_as(w) + alpha * delta
            activations = torch.cat([x.clamp(min=0), x.clamp(max=0)], 1) if first_release else x.relu()
            x = batch_norm(functional.conv2d(activations, w, padding=1), f"{name}.bn")
    x = x if first_release and not notebook else x.relu()
    return functional.linear(x.mean((2, 3)), numbers["fc.weight"], numbers["fc.bias"])


@pytest.mark.parametrize("release", [1, "notebook", 2])
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


def test_an_imported_net_of_the_second_release_keeps_its_delta_in_training(tmp_path):
    """A step moves every a, and no δ that their net has not: outputs beyond the inputs stay without a one."""
    torch.save(authors_file(2, "cifar"), tmp_path / "model.pt7")
    checkpoint = import_original(tmp_path / "model.pt7")
    assert checkpoint.spec.delta == "first"
    net = load_net(checkpoint).train()
    layer = net.group1.block0.conv
    before = layer.a.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    functional.cross_entropy(net(images), torch.arange(4)).backward()
    optimizer.step()
    moved = (layer.a != before).numpy()
    np.testing.assert_array_equal(moved, np.arange(8) < 4)  # the loss does not see the other a
    expected = reference.folded_weight(
        layer.a.detach().numpy(), layer.b.detach().numpy(), layer.weight.detach().numpy(), form="first"
    )
    np.testing.assert_allclose(layer.folded_weight().detach(), expected, rtol=0, atol=1e-6)


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


def _without_eyes(stats):
    return {name: value for name, value in stats.items() if not name.startswith("eye")}


def _with_eye(content, eye):
    return content | {"stats": content["stats"] | {"eye" + "_".join(map(str, eye.shape)): eye}}


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
            "group0.block0.alpha and beta hold 4 and 1 numbers",
        ),
        (lambda content: _with_eye(content, torch.zeros(8, 16, 3, 3)), "eye8_16_3_3 is neither"),
        (lambda content: content | {"stats": _without_eyes(content["stats"])}, "eye4_8_3_3 missing"),
        (
            lambda content: _with_eye(content, torch.from_numpy(reference.delta((4, 8, 3, 3), "first"))),
            "δ is of two forms",
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
