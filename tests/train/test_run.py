import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fold.plain import fold_net
from fold.proof import prove
from train import session, steps
from train.checkpoint import load_checkpoint, load_net
from train.cli import run_command
from train.config import TrainConfig
from train.loop import train_step
from train.refusal import Refusal
from train.run import command

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--depth", "10", "--width", "0.25", "--epochs", "2", "--batch-size", "128"]


def run(*argv):
    return run_command(command, TrainConfig, argv=[*SMALL, *map(str, argv)])


def weights(path):
    checkpoint = load_checkpoint(path / "checkpoint.pt")
    momentum = [value["momentum_buffer"] for value in checkpoint.optimizer["state"].values()]
    return [*checkpoint.model.values(), *momentum]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(*pair) for pair in zip(left, right, strict=True))


@pytest.mark.slow
def test_a_run_leaves_all_its_files_and_the_seed_decides_everything(tmp_path, capsys):
    assert run("--out", tmp_path / "a", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["test_images"] == 359
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "checkpoint.pt",
        "best.pt",
        "metrics.jsonl",
        "learning_curve.png",
    }
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    with Image.open(tmp_path / "a" / "learning_curve.png") as curve:
        assert curve.width > 500
    assert load_checkpoint(tmp_path / "a" / "checkpoint.pt").test_accuracy == result["test_accuracy"]
    assert run("--out", tmp_path / "b") == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert run("--out", tmp_path / "c", "--seed", 1) == 0
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third step of an epoch, then --resume: equal to a run that was left alone."""
    argv = ["--depth", "10", "--width", "0.25", "--batch-size", "256", "--epochs", "2"]
    num_steps = 0

    def step(*arguments, **options):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            signal.raise_signal(signal.SIGINT)
        return train_step(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(steps, "train_step", step)
        assert run(*argv, "--out", tmp_path / "cut") == 130
    assert "interrupted: go on with: " in capsys.readouterr().err
    cut = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")
    assert (cut.epoch, cut.step) == (0, 3)
    assert run_command(command, TrainConfig, argv=["--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert run(*argv, "--out", tmp_path / "whole") == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_finished_run_is_neither_overwritten_nor_trained_again(tmp_path, capsys):
    assert run("--out", tmp_path) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert run("--out", tmp_path) == 2
    assert "add --resume to go on" in capsys.readouterr().err
    assert run("--out", tmp_path, "--resume", "--lr", "0.5") == 2
    assert "was started with --lr 0.1" in capsys.readouterr().err
    assert run("--out", tmp_path, "--resume") == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert run("--out", tmp_path) == 0
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"text", content[:-40]):
        path.write_bytes(damaged)
        with pytest.raises(Refusal, match="no checkpoint, or is cut short"):
            load_checkpoint(path)
    torch.save({"something": 1}, path)
    with pytest.raises(Refusal, match="train one with train/run"):
        load_checkpoint(path)


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_is_read_without_executing_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "diracnet-checkpoint-1", "model": _Evil()}, "evil.pt")
    with pytest.raises(Refusal, match="no checkpoint"):
        load_checkpoint(Path("evil.pt"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("lr", ["nan", "inf", "-inf", "0", "-0.1"])
def test_a_rate_that_is_not_positive_and_finite_is_refused(lr, tmp_path, capsys):
    assert run(f"--lr={lr}", "--out", tmp_path) == 2
    assert "--lr must be positive and finite" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_diverges_ends_at_that_epoch_and_keeps_the_files_of_the_one_before(tmp_path, capsys, monkeypatch):
    original = session.take_steps

    def diverge(*args, epoch, **kwargs):
        for step in original(*args, epoch=epoch, **kwargs):
            yield replace(step, sums=step.sums * float("nan")) if epoch == 1 else step

    monkeypatch.setattr(session, "take_steps", diverge)
    assert run("--epochs", 3, "--out", tmp_path) == 2
    assert "training diverged, the loss of epoch 2 is nan: lower --lr" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoint.pt").epoch == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1]


@pytest.mark.slow
def test_a_rate_far_too_high_ends_with_one_line(tmp_path, capsys):
    assert run("--lr", "1e30", "--out", tmp_path) == 2
    assert "training diverged" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


def test_describe_prints_the_spec_and_counts_without_a_data_set(capsys):
    assert run("--describe", "--json", "--family", "cifar", "--classes", "10", "--depth", "34", "--width", "2") == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["parameters"], described["depth"], described["image"]["channels"]) == (3_693_158, 34, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--depth", "20"], "depth must be 6N + 4"),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], "cifar10 is not readable in /nowhere"),
        (["--dataset", "fashion-mnist", "--data-dir", "/nowhere"], "Fashion-MNIST is not in /nowhere"),
        (["--dataset", "folder"], "needs --data-dir"),
        (["--dataset", "folder", "--data-dir", "/nowhere"], "cannot read the folder /nowhere"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--resume"], "cannot read"),
        (["--crop", "8"], "--crop must be smaller than the image"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(argv, message, tmp_path, capsys):
    assert run("--out", tmp_path / "run", *argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_of_class_folders_trains_and_names_its_unreadable_image(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(10):
            pixels = np.clip(rng.normal(level, 20, (12, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{index}.png")
    argv = ("--dataset", "folder", "--data-dir", tmp_path / "data", "--image-size", "8", "--validation", "0")
    assert run(*argv, "--out", tmp_path / "run") == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt").spec.labels == ("dark", "light")
    (tmp_path / "data" / "dark" / "3.png").write_bytes(b"no image")
    assert run(*argv, "--out", tmp_path / "again") == 2
    assert "1 of 20 images cannot be read, the first is " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "parameters"),
    [
        ("--family imagenet --classes 1000 --depth 18 --width 0.75", 12_756_600),
        ("--family imagenet-table3 --classes 1000 --depth 34 --width 0.75", 34_745_440),
        ("--family wrn --classes 10 --depth 28 --width 10", 36_479_194),
    ],
)
def test_describe_counts_every_family(argv, parameters, capsys):
    assert run_command(command, TrainConfig, argv=["--describe", "--json", *argv.split()]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == parameters


@pytest.mark.parametrize(
    ("argv", "form"),
    [
        ("", "ncrelu, dirac"),
        ("--nonlinearity relu", "relu, dirac"),
        ("--parameterization per-channel", "relu, per-channel"),
        ("--parameterization plain", "ncrelu, plain"),
        ("--family wrn", "relu, plain"),
        ("--family wrn --parameterization delta", "relu, delta"),
    ],
)
def test_a_net_takes_the_form_that_suits_what_was_given(argv, form, capsys):
    assert run_command(command, TrainConfig, argv=["--describe", *argv.split()]) == 0
    assert f"-16-1, {form}, 8x8x1 images, 10 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--family wrn --nonlinearity ncrelu", "family wrn goes with nonlinearity relu"),
        ("--family wrn --parameterization dirac", "family wrn goes with nonlinearity relu"),
        ("--parameterization per-channel --nonlinearity ncrelu", "per-channel a and b go with nonlinearity relu"),
    ],
)
def test_a_form_that_was_given_and_does_not_fit_is_refused(argv, message, capsys):
    assert run_command(command, TrainConfig, argv=["--describe", *argv.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_form_that_was_chosen_is_recorded_and_resumed(tmp_path, capsys):
    argv = ["--depth", "10", "--width", "0.25", "--epochs", "1", "--out", str(tmp_path)]
    assert run_command(command, TrainConfig, argv=["--family", "wrn", *argv]) == 0
    recorded = load_checkpoint(tmp_path / "checkpoint.pt").config
    assert (recorded["nonlinearity"], recorded["parameterization"]) == ("relu", "plain")
    assert "--nonlinearity" not in recorded["command"]
    explicit = ["--family", "wrn", "--nonlinearity", "relu", "--parameterization", "plain", *argv, "--resume"]
    assert run_command(command, TrainConfig, argv=explicit) == 0
    assert run_command(command, TrainConfig, argv=["--out", str(tmp_path), "--resume"]) == 0
    assert run_command(command, TrainConfig, argv=[*argv, "--resume", "--family", "pooled"]) == 2
    assert "was started with --family wrn; resume it with the same" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_net_trains_and_folds_like_any_other(tmp_path):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    # As a process: torch.compile's own warnings are none of ours.
    argv = [*SMALL, "--compile", "--precision", "fp32", "--epochs", "1", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(ROOT / "train" / "run.py"), *argv], check=True, capture_output=True)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert not any("_orig_mod" in name for name in checkpoint.model)
    net = load_net(checkpoint)
    assert prove(net, fold_net(net), {"random": torch.zeros(1, 8, 8, 1, dtype=torch.uint8)})
