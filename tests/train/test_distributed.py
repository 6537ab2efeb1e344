"""Two processes under torchrun with gloo: their gradients are the one process's, and a stopped run resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from train import data
from train.checkpoint import load_checkpoint
from train.distributed import World
from train.families import build
from train.initialize import initialize
from train.loop import Augmentation, batches
from train.spec import Spec

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
# What each process runs: this module's functions, then DDP.
PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import torch
from test_distributed import gradients
from train.distributed import joined
with joined("cpu") as world:
    for mode in ("train", "eval"):
        found = gradients(mode, world, wrap=world.wrap)
        torch.save(found, f"{{sys.argv[1]}}/{{mode}}{{world.rank}}.pt")
    assert world.any(world.rank == 1) and not world.any(False)
"""


def gradients(mode, world, wrap=lambda net: net):
    """Of the mean loss over a process's share of one augmented batch; "eval" leaves batch statistics out."""
    digits = data.load("digits")
    torch.manual_seed(0)
    net = build(Spec("cifar", 10, 0.25, "ncrelu", digits.info.image, digits.info.labels))
    initialize(net, a=1.0, b=0.1, std=0.03)
    net.train(mode == "train")
    augmentation = Augmentation(flip=True, crop=1, smallest_crop=1.0)
    settings = {"batch_size": 64, "epoch": 0, "first_step": 0, "seed": 0, "world": world}
    batch = next(batches(digits.train, augmentation, **settings))
    shared = wrap(net)
    functional.cross_entropy(shared(batch.images), batch.targets).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def torchrun(*argv, processes=2, **options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, *map(str, argv)], env=environment, text=True, **options)


def run(*argv, **options):
    process = torchrun(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    output, error = process.communicate(timeout=240)
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


def test_two_processes_train_stop_and_resume_bit_for_bit(tmp_path):
    argv = [ROOT / "train" / "run.py", "--depth", 10, "--width", 0.25, "--batch-size", 8, "--epochs", 3, "--json"]
    result = json.loads(run(*argv, "--out", tmp_path / "whole"))
    assert result["test_accuracy"] > 0.8
    process = torchrun(*argv, "--out", tmp_path / "cut", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "cut" / "metrics.jsonl").exists():  # the first epoch's
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    cut = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")
    assert cut.epoch < 3
    run(*argv, "--out", tmp_path / "cut", "--resume")
    whole, cut = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut.model[name]) for name, tensor in whole.model.items())
    assert load_checkpoint(tmp_path / "cut" / "best.pt").test_accuracy == result["test_accuracy"]


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
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: --batch-size must be a multiple of the 2 processes, got 33" in error
