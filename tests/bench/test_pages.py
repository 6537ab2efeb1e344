"""Each benchmark from end to end on nets of seconds, and what its page says."""

import json

import pytest

from bench import folding, startup, training
from common.cli import run_command
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow


def run(module, config_type, *argv):
    return run_command(module.command, config_type, argv=[str(part) for part in argv])


@pytest.fixture
def finished_run(tmp_path):
    """A checkpoint that says it learnt Fashion-MNIST: 92 % after its second epoch of 10 s."""
    from dataclasses import replace

    from bench.training_steps import make_checkpoint

    path = tmp_path / "run" / "checkpoint.pt"
    make_checkpoint(10, 0.25, path)
    row = {"train_accuracy": 0.9, "images_per_s": 100.0, "seconds": 10.0}
    history = [{**row, "epoch": epoch, "validation_accuracy": 0.905 + 0.01 * epoch} for epoch in (1, 2)]
    state: Checkpoint = load_checkpoint(path)
    config = {**state.config, "dataset": "fashion-mnist", "command": "python train/run.py"}
    save_checkpoint(path, replace(state, config=config, history=history, test_accuracy=0.92))
    return path


def test_training(tmp_path, monkeypatch, capsys, finished_run):
    monkeypatch.setattr(training, "NETS", ((10, 0.25),))
    monkeypatch.setattr(training, "DEPTHS", (10, 16, 22, 28, 34))
    assert run(training, training.TrainingConfig, finished_run, "--quick", "--out", tmp_path) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    page = (tmp_path / "training.md").read_text()
    assert record["command"] == f"python bench/training.py {finished_run} --quick"
    assert [row["form"] for row in record["steps"][0]["rows"]] == 2 * list(training.FORMS)
    assert [row["processes"] for row in record["processes"]] == [1, 2]
    assert "| 92 % | 2 | 20 |" in page
    assert "| 94 % | never |  |" in page


def test_training_refuses_a_run_on_something_else(tmp_path, capsys, finished_run):
    from bench.training_steps import make_checkpoint

    make_checkpoint(10, 0.25, finished_run)
    assert run(training, training.TrainingConfig, finished_run, "--quick", "--out", tmp_path) == 2
    assert "is not a finished run on fashion-mnist" in capsys.readouterr().err


def test_folding(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folding, "QUICK_NETS", ((10, 0.25), (10, 0.5)))
    assert run(folding, folding.FoldingConfig, "--quick", "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "folding.json").read_text())["rows"]
    assert [(row["command"], row["net"]) for row in rows] == [
        (name, net) for name in folding.MODULES for net in ("10-0.25", "10-0.5")
    ]
    assert all(run["peak_bytes"] > run["imported_bytes"] for row in rows for run in row["runs"])
    text = (tmp_path / "folding.md").read_text()
    assert all(f"| {row['command']} | {row['net']} | {row['parameters'] / 1e6:.2f} |" in text for row in rows)


def test_startup(tmp_path, capsys):
    assert run(startup, startup.StartupConfig, "--quick", "--out", tmp_path) == 0
    models = json.loads((tmp_path / "startup.json").read_text())["models"]
    assert [model["name"] for model in models] == ["tiny.onnx", "fashion-mnist.onnx"]
    for model in models:
        assert len(model["starts"]) == 3
        assert not any(start["has_torch"] for start in model["starts"])
    assert "| tiny.onnx | " in (tmp_path / "startup.md").read_text()
