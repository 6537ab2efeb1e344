import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import run_command
from common.image import decode
from common.refusal import Refusal
from common.spec import ImageSpec
from fold.graph import fold
from fold.plain import save_plain
from fold.proof import prove
from train import trainer
from train.checkpoint import Checkpoint, load_checkpoint, load_net, save_checkpoint
from train.config import TrainConfig
from train.data import datasets
from train.families import build
from train.run import command
from train.trainer import Score, evaluate, train_step

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--depth", "10", "--width", "0.25", "--epochs", "2", "--batch-size", "128"]


def run(*argv):
    return run_command(command, TrainConfig, argv=[*SMALL, *map(str, argv)])


def weights(path):
    checkpoint = load_checkpoint(path / "checkpoint.pt")
    momentum = [value["momentum_buffer"] for value in checkpoint.optimizer["state"].values()]
    return [*checkpoint.model.values(), *checkpoint.average.values(), *momentum]


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
    best, last = (load_checkpoint(tmp_path / "a" / name) for name in ("best.pt", "checkpoint.pt"))
    assert (best.test_accuracy, best.epoch) == (result["test_accuracy"], result["epoch"])
    test = datasets.load("digits").test
    assert [evaluate(load_net(state), test).accuracy for state in (best, last)] == [
        best.test_accuracy,
        last.test_accuracy,
    ]
    assert run("--out", tmp_path / "b") == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert run("--out", tmp_path / "c", "--seed", 1) == 0
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of one epoch, to fine-tune."""
    folder = tmp_path_factory.mktemp("source")
    assert run("--out", folder, "--epochs", 1, "--validation", 0) == 0
    return folder / "checkpoint.pt"


@pytest.fixture(scope="module")
def plain(source):
    """The fold of `source`."""
    state, path = load_checkpoint(source), source.with_name("plain.safetensors")
    save_plain(path, fold(load_net(state)).float(), state.spec, {"training": state.training_record()})
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "means",
    [
        "",
        "--ema 0.9 --mixup 0.2 --cutmix 1 --balanced",
        "--init SOURCE --freeze 1 --ema 0.9",
        "--init PLAIN --qat --lr 0.01",
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(means, source, plain, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third step of an epoch, then what it prints: equal to a run that was left alone."""
    means = means.replace("SOURCE", str(source)).replace("PLAIN", str(plain))
    argv = ["--epochs", "2", "--batch-size", "256", *means.split()]
    num_steps = 0

    def step(*arguments, **options):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            signal.raise_signal(signal.SIGINT)
        return train_step(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "train_step", step)
        assert run(*argv, "--out", tmp_path / "cut") == 130
    pasted = capsys.readouterr().err.removeprefix("interrupted: go on with: ")
    cut = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")
    assert (cut.epoch, cut.step) == (0, 3)
    subprocess.run(shlex.split(pasted), check=True, capture_output=True)
    assert run(*argv, "--out", tmp_path / "whole") == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    chosen = [load_checkpoint(tmp_path / name / "best.pt").weights for name in ("cut", "whole")]
    assert same(*(list(weights.values()) for weights in chosen))


@pytest.mark.slow
def test_more_epochs_go_on_from_the_last_and_say_that_the_test_images_are_known(tmp_path, capsys):
    assert run("--out", tmp_path, "--epochs", 2) == 0
    resumed = ["--resume", "--out", str(tmp_path)]
    assert run_command(command, TrainConfig, argv=[*resumed, "--epochs", "1"]) == 2
    assert "--epochs may grow" in capsys.readouterr().err
    assert run_command(command, TrainConfig, argv=[*resumed, "--epochs", "3"]) == 0
    assert "the test images were read after epoch 2" in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (state.epoch, state.config["epochs"], state.config["batch_size"]) == (3, 3, 128)
    assert state.test_accuracy == evaluate(load_net(state), datasets.load("digits").test).accuracy


@pytest.mark.slow
def test_patience_ends_a_run_that_gets_no_better(tmp_path, capsys, monkeypatch):
    scores = chain([0.5, 0.6, 0.6, 0.4], repeat(0.9))
    monkeypatch.setattr(trainer, "evaluate", lambda *args, **kwargs: Score(1.0, next(scores)))
    assert run("--out", tmp_path, "--epochs", 9, "--patience", 2) == 0
    assert "no better validation accuracy for 2 epochs: training ends here" in capsys.readouterr().out
    assert [load_checkpoint(tmp_path / name).epoch for name in ("checkpoint.pt", "best.pt")] == [4, 2]


@pytest.mark.slow
def test_fine_tuning_takes_all_layers_but_the_last_and_leaves_them_while_they_are_frozen(source, tmp_path, capsys):
    argv = ["--init", str(source), "--epochs", "1", "--validation", "0"]
    assert run_command(command, TrainConfig, argv=[*argv, "--freeze", "1", "--out", str(tmp_path / "a")]) == 0
    learnt, frozen = load_checkpoint(source), load_checkpoint(tmp_path / "a" / "checkpoint.pt")
    assert frozen.spec == learnt.spec  # depth and width too
    for name, tensor in learnt.model.items():
        assert torch.equal(tensor, frozen.model[name]) == (not name.startswith("fc.")), name
    assert frozen.training_record()["init_sha256"] == learnt.sha256
    assert str(source.parent) not in frozen.config["command"]
    assert run_command(command, TrainConfig, argv=[*argv, "--out", str(tmp_path / "b")]) == 0
    tuned = load_checkpoint(tmp_path / "b" / "checkpoint.pt")
    assert not torch.equal(tuned.model["stem.conv.weight"], learnt.model["stem.conv.weight"])
    assert run_command(command, TrainConfig, argv=[*argv, "--depth", "34", "--out", str(tmp_path / "c")]) == 2
    assert "the net of --init has --depth 10: leave out --depth 34" in capsys.readouterr().err
    assert run_command(command, TrainConfig, argv=[*argv, "--dataset", "cifar10", "--out", str(tmp_path / "c")]) == 2
    assert "cifar10 has images of shape (32, 32, 3), the net takes (8, 8, 1)" in capsys.readouterr().err


@pytest.mark.slow
def test_photographs_are_prepared_as_the_net_that_is_fine_tuned_wants_them(tmp_path, photos, make_spec, capsys):
    image = ImageSpec(8, 8, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resize=11)
    spec = replace(make_spec(), image=image)
    save_checkpoint(tmp_path / "imported.pt", Checkpoint.fresh(spec, build(spec).state_dict(), {"dataset": "folder"}))
    argv = ["--init", str(tmp_path / "imported.pt"), "--data-dir", str(photos), "--epochs", "1"]
    assert run_command(command, TrainConfig, argv=[*argv, "--out", str(tmp_path / "run")]) == 0
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert (state.spec.image, state.spec.labels) == (image, ("dark", "light"))
    assert state.config["batch_size"] == 8
    read = datasets.load_as_trained(state.config, beside=tmp_path / "run", image=image).test
    assert np.array_equal(read.first(1)[0], decode(Path(read.paths[0]).read_bytes(), image))
    assert run_command(command, TrainConfig, argv=["--resume", "--out", str(tmp_path / "run"), "--epochs", "2"]) == 0
    shutil.copy(tmp_path / "imported.pt", tmp_path / "checkpoint.pt")
    assert run_command(command, TrainConfig, argv=["--resume", "--out", str(tmp_path)]) == 2
    assert "holds an imported net" in capsys.readouterr().err


@pytest.mark.slow
def test_event_files_hold_what_the_metrics_say_and_go_on_with_the_run(tmp_path, monkeypatch, capsys):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run("--out", tmp_path, "--tensorboard", "--epochs", 1) == 0
    argv = ["--resume", "--out", str(tmp_path), "--epochs", "2", "--tensorboard"]
    assert run_command(command, TrainConfig, argv=argv) == 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for tag, key in (("loss/train", "train_loss"), ("accuracy/validation", "validation_accuracy"), ("run/lr", "lr")):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in rows]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run("--out", tmp_path / "without", "--tensorboard") == 2
    assert "pip install tensorboard" in capsys.readouterr().err


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
        with pytest.raises(Refusal, match="not a checkpoint, or is cut short"):
            load_checkpoint(path)
    torch.save({"something": 1}, path)
    with pytest.raises(Refusal, match="train one with train/run"):
        load_checkpoint(path)


def test_a_checkpoint_of_other_types_is_refused(tmp_path):
    torch.save({"format": "diracnet-checkpoint-1", "config": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(Refusal, match="is damaged: config is not"):
        load_checkpoint(tmp_path / "checkpoint.pt")


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_is_read_without_executing_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "diracnet-checkpoint-1", "model": _Evil()}, "evil.pt")
    with pytest.raises(Refusal, match="not a checkpoint"):
        load_checkpoint(Path("evil.pt"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("lr", ["nan", "inf", "-inf", "0", "-0.1"])
def test_a_rate_that_is_not_positive_and_finite_is_refused(lr, tmp_path, capsys):
    assert run(f"--lr={lr}", "--out", tmp_path) == 2
    assert "--lr must be positive and finite" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_diverges_ends_at_that_epoch_and_keeps_the_files_of_the_one_before(tmp_path, capsys, monkeypatch):
    def diverge(net, optimizer, scaler, batch, recipe, **options):
        sums = train_step(net, optimizer, scaler, batch, recipe, **options)
        return sums * float("nan") if batch.epoch == 1 else sums

    monkeypatch.setattr(trainer, "train_step", diverge)
    assert run("--epochs", 3, "--out", tmp_path) == 2
    assert "training diverged, the loss of epoch 2 is nan: lower --lr" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoint.pt").epoch == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1]


@pytest.mark.slow
def test_a_validation_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(tmp_path, capsys, monkeypatch):
    """One step an epoch: the first at a rate of 0, the second blows the weights up after its own loss was finite."""
    monkeypatch.setattr(trainer, "learning_rate", lambda schedule, lr, done, **_: lr * (done >= 0.5))
    argv = ("--batch-size", 2000, "--epochs", 2, "--lr", "1e30", "--precision", "fp32")
    assert run(*argv, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert "training diverged, the validation loss of epoch 2 is nan: lower --lr" in error
    assert load_checkpoint(tmp_path / "checkpoint.pt").epoch == load_checkpoint(tmp_path / "best.pt").epoch == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1]


@pytest.mark.slow
def test_the_papers_recipe_trains_on_all_training_images_in_fp32(tmp_path, capsys):
    assert run("--recipe", "paper", "--epochs", 1, "--json", "--out", tmp_path) == 0
    captured = capsys.readouterr()
    assert ", fp32, seed 0" in captured.err
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    parts = datasets.load_as_trained(checkpoint.config)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (1438, 0, 359)
    assert checkpoint.history[0]["validation_accuracy"] is None
    assert load_checkpoint(tmp_path / "best.pt").epoch == 1


def test_shared_batch_statistics_are_refused_on_a_cpu(tmp_path, capsys):
    assert run("--sync-batch-norm", "--device", "cpu", "--out", tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: --sync-batch-norm needs CUDA devices")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rate_far_too_high_ends_with_one_line(tmp_path, capsys):
    assert run("--lr", "1e30", "--out", tmp_path) == 2
    assert "training diverged" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


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
    assert prove(net, fold(net), {"random": torch.zeros(1, 8, 8, 1, dtype=torch.uint8)})
