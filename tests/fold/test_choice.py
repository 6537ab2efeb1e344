"""Which checkpoint of a run is folded."""

from dataclasses import replace

import pytest
import torch

from common.cli import run_command
from fold.plain import load_plain
from fold.run import FoldConfig, command
from train.checkpoint import Checkpoint, load_checkpoint, load_net, save_checkpoint

ROW = {"validation_accuracy": 0.9, "validation_loss": 0.3}


@pytest.fixture
def run(make_net, make_spec, tmp_path):
    """A run of two epochs, the first of which is the best."""
    for name, epoch in (("best.pt", 1), ("checkpoint.pt", 2)):
        net = make_net(seed=epoch)
        state = Checkpoint.fresh(make_spec(), net.state_dict(), {}, epoch=epoch, history=[ROW] * epoch)
        save_checkpoint(tmp_path / name, replace(state, test_accuracy=epoch / 10))
    return tmp_path


def fold(*argv):
    return run_command(command, FoldConfig, argv=[str(word) for word in argv])


@pytest.mark.slow
def test_a_runs_folder_is_its_best_epoch_and_that_is_said(run, capsys):
    assert fold(run) == 0
    assert f"folding {run / 'best.pt'}: epoch 1, 90.00 % of the validation images" in capsys.readouterr().out
    plain = load_plain(run / "plain.safetensors")
    assert plain.provenance["training"]["test_accuracy"] == 0.1
    assert plain.provenance["fold"]["checkpoint_sha256"] == load_checkpoint(run / "best.pt").sha256


@pytest.mark.slow
def test_a_checkpoint_that_is_named_is_taken_and_the_better_one_is_mentioned(run, capsys):
    assert fold(run / "checkpoint.pt") == 0
    assert "checkpoint.pt: epoch 2, 90.00 % of the validation images; best.pt is the epoch" in capsys.readouterr().out
    assert load_plain(run / "plain.safetensors").provenance["training"]["test_accuracy"] == 0.2


@pytest.mark.slow
def test_without_a_best_epoch_the_last_is_folded(run, capsys):
    (run / "best.pt").unlink()
    assert fold(run) == 0
    assert f"folding {run / 'checkpoint.pt'}" in capsys.readouterr().out
    assert fold(run / "nothing") == 2


def test_the_average_is_what_is_folded_where_a_run_keeps_one(make_net, make_spec, tmp_path):
    weights, average = (make_net(seed=seed).state_dict() for seed in (1, 2))
    state = Checkpoint.fresh(make_spec(), weights, {}, average=average)
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    net = load_net(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert all(torch.equal(tensor, average[name]) for name, tensor in net.state_dict().items())
