"""What train/run.py makes of its command line, without training."""

import json

import pytest
import torch

from common.cli import run_command
from train.config import TrainConfig
from train.run import command


def run(*argv):
    return run_command(command, TrainConfig, argv=["--depth", "10", "--width", "0.25", *map(str, argv)])


def test_training_in_float32_is_without_tf32(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert run("--depth", 20, "--out", tmp_path) == 2  # refused, but not before that
    assert not torch.backends.cudnn.allow_tf32


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_epoch(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    assert run("--out", tmp_path / "file" / "run") == 2
    output = capsys.readouterr()
    assert f"cannot write to {tmp_path / 'file' / 'run'}: Not a directory; name another folder with --out" in output.err
    assert not output.out
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


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
        (["--freeze", "1"], "name a checkpoint with --init"),
        (["--patience", "2", "--validation", "0"], "--validation must be above 0"),
        (["--init", "/nowhere"], "cannot read /nowhere"),
        (["--init", "/nowhere.safetensors"], "cannot read /nowhere.safetensors"),
        (["--init", "plain.onnx"], "plain.onnx is an exported file; name the plain.safetensors"),
        (["--qat", "--precision", "bf16"], "--qat trains chains of layers in fp32"),
        (["--qat", "--compile"], "leave out --compile"),
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
        ("--family wrn --nonlinearity ncrelu", "family wrn requires nonlinearity relu"),
        ("--family wrn --parameterization dirac", "family wrn requires nonlinearity relu"),
        ("--parameterization per-channel --nonlinearity ncrelu", "per-channel a and b require nonlinearity relu"),
    ],
)
def test_a_form_that_was_given_and_does_not_fit_is_refused(argv, message, capsys):
    assert run_command(command, TrainConfig, argv=["--describe", *argv.split()]) == 2
    assert message in capsys.readouterr().err
