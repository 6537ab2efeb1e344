"""Two processes under torchrun with gloo: their gradients are the one process's, and a stopped run resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from common.spec import Spec
from train import machine
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.data import datasets
from train.data.batches import batches
from train.families import build, initialize
from train.machine import World

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # up to three runs, each of many processes' imports
# What each process runs: this module's functions, then DDP.
PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import torch
from test_distributed import gradients
from train.machine import joined
with joined("cpu") as world:
    for mode in ("train", "eval"):
        found = gradients(mode, world, wrap=world.wrap)
        torch.save(found, f"{{sys.argv[1]}}/{{mode}}{{world.rank}}.pt")
    assert world.any(world.rank == 1) and not world.any(False)
"""

# Ctrl-C in the third step: the first process asks torchrun for it, and goes on when it has come.
CUT = f"""
import os
import signal
import sys
import threading
sys.path.insert(0, {str(ROOT)!r})
from train import trainer
from common.cli import run_command
from train.config import TrainConfig
from train.run import command
num_steps, train_step = 0, trainer.train_step

def step(*arguments, **options):
    global num_steps
    num_steps += 1
    if num_steps == 3 and os.environ["RANK"] == "0":
        came = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            signal.signal(number, lambda *given, before=before: (before(*given), came.set()))
        os.kill(os.getppid(), signal.SIGINT)
        came.wait(200)
    return train_step(*arguments, **options)

trainer.train_step = step
sys.exit(run_command(command, TrainConfig))
"""


def gradients(mode, world, wrap=lambda net: net):
    """Of the mean loss over a process's share of one augmented batch; "eval" leaves batch statistics out."""
    digits = datasets.load("digits")
    torch.manual_seed(0)
    net = build(Spec("cifar", 10, 0.25, "ncrelu", digits.info.image, digits.info.labels))
    initialize(net, a=1.0, b=0.1, std=0.03)
    net.train(mode == "train")
    settings = TrainConfig(flip="yes", crop=1, batch_size=64).resolved()
    batch = next(batches(digits.train, settings, digits.info, epoch=0, first_step=0, world=world))
    shared = wrap(net)
    functional.cross_entropy(shared(batch.images), batch.targets).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def torchrun(*argv, processes=2, **options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, *map(str, argv)], env=environment, text=True, **options)


def run(*argv, **options):
    process = torchrun(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    output, error = process.communicate(timeout=280)
    assert process.returncode == 0, error
    return output


def test_the_gradients_of_two_processes_are_those_of_one(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run(tmp_path / "program.py", tmp_path)
    for mode in ("train", "eval"):
        of_two = [torch.load(tmp_path / f"{mode}{rank}.pt", weights_only=True) for rank in (0, 1)]
        # Batch statistics are each process's own: one process has them when it takes the shares one by one.
        shares = [gradients(mode, World(rank, 2)) for rank in (0, 1)]
        whole = gradients(mode, World())
        for name, gradient in of_two[0].items():
            assert torch.equal(gradient, of_two[1][name])
            tolerance = {"rtol": 0, "atol": 1e-6 * max(1.0, gradient.abs().max().item())}
            assert torch.allclose(gradient, (shares[0][name] + shares[1][name]) / 2, **tolerance), name
            if mode == "eval":
                assert torch.allclose(gradient, whole[name], **tolerance), name


def test_what_processes_agree_on_at_every_step_stays_on_their_hosts(monkeypatch):
    """A number that came from the device would have the host wait for all that the device has still to do."""
    devices = []

    def all_reduce(numbers):
        devices.append(numbers.device.type)
        numbers.mul_(2)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    world = World(0, 2, "cuda:0")
    assert (world.count(3), world.any(True), world.any(False)) == (6, True, False)
    assert devices == ["cpu"] * 3


def test_two_processes_train_stop_and_resume_bit_for_bit(tmp_path):
    argv = ["--depth", 10, "--width", 0.25, "--batch-size", 16, "--epochs", 2, "--json"]
    command, interrupted = ROOT / "train" / "run.py", tmp_path / "interrupted.py"
    result = json.loads(run(command, *argv, "--out", tmp_path / "whole"))
    assert result["test_accuracy"] > 0.8
    interrupted.write_text(CUT)
    process = torchrun(interrupted, *argv, "--out", tmp_path / "cut", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=280)
    assert process.returncode, error
    cut = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")
    assert (cut.epoch, cut.step) == (0, 3), error
    run(command, *argv, "--out", tmp_path / "cut", "--resume")
    whole, cut = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut.model[name]) for name, tensor in whole.model.items())
    assert load_checkpoint(tmp_path / "cut" / "best.pt").test_accuracy == result["test_accuracy"]


def test_batch_statistics_are_shared_where_that_is_asked_for(monkeypatch):
    """Which layers do it; that they do takes GPUs, where alone PyTorch's SyncBatchNorm runs."""
    monkeypatch.setattr(machine, "DistributedDataParallel", lambda net, device_ids: net)
    digits = datasets.load("digits")
    for sync in (False, True):
        torch.manual_seed(0)
        net = build(Spec("cifar", 10, 0.25, "ncrelu", digits.info.image, digits.info.labels))
        before, names = list(net.parameters()), list(net.state_dict())
        images = torch.from_numpy(digits.test.first(2))
        expected = net.eval()(images)
        wrapped = World(rank=0, size=2, device="cuda:0").wrap(net, sync_batch_norm=sync)
        kinds = {type(layer) for layer in net.modules() if "BatchNorm" in type(layer).__name__}
        assert kinds == {nn.SyncBatchNorm if sync else nn.BatchNorm2d}
        assert all(one is other for one, other in zip(before, net.parameters(), strict=True))  # the optimizer's
        assert list(net.state_dict()) == names
        assert torch.equal(wrapped(images), expected)


def make_photos(root, unreadable):
    """16 photographs to train on and two to test with; a JPEG without checksum shows only late that it is cut."""
    rng = np.random.default_rng(0)
    for part, num in (("train", 8), ("val", 1)):
        for label in ("dark", "light"):
            (root / part / label).mkdir(parents=True)
            for index in range(num):
                pixels = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{index}.jpg")
    for index in unreadable:
        path = root / "train" / ("dark", "light")[index // 8] / f"{index % 8}.jpg"
        path.write_bytes(path.read_bytes()[:1000])


def test_a_share_without_a_readable_file_neither_hangs_nor_weighs_on_the_step(tmp_path):
    """Of four batches, two processes can read the first's share, nothing, and twice the second's share."""
    order = np.random.default_rng((0, 0)).permutation(16)
    make_photos(tmp_path / "photos", unreadable=[*order[2:10], *order[12:14]])
    argv = [ROOT / "train" / "run.py", "--dataset", "folder", "--data-dir", tmp_path / "photos", "--image-size", 8]
    argv += ["--skip-unreadable", "--validation", 0, "--workers", 0, "--depth", 10, "--width", 0.25]
    argv += ["--batch-size", 4, "--epochs", 1, "--precision", "fp32", "--warmup", 0, "--erase", 0]
    output = run(*argv, "--out", tmp_path / "two")
    assert "epoch 1: 10 of 16 images could not be read" in output
    run(*argv, "--out", tmp_path / "one", processes=1)
    two, one = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("two", "one"))
    assert two.history[0]["train_loss"] == pytest.approx(one.history[0]["train_loss"], rel=1e-5)
    for name, tensor in one.model.items():
        if "running" not in name and "num_batches" not in name:  # those are the first process's own
            torch.testing.assert_close(two.model[name], tensor, rtol=0, atol=1e-5)


def test_a_batch_that_the_processes_cannot_share_is_refused_in_one_line(tmp_path):
    argv = [ROOT / "train" / "run.py", "--batch-size", 33, "--out", tmp_path]
    process = torchrun(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=280)
    assert process.returncode != 0
    assert "error: --batch-size must be a multiple of the 2 processes, got 33" in error
