"""Checkpoints of nets that were never trained, for what reads checkpoints."""

from pathlib import Path

import torch
from torch import nn

from common.spec import Spec
from train.checkpoint import Checkpoint, save_checkpoint
from train.data.batches import Batch
from train.data.datasets import cifar_image
from train.families import build, count_parameters
from train.initialize import initialize
from train.loop import make_optimizer, train_step

BATCH_SIZE = 8


def make_checkpoint(depth: int, width: float, path: Path, *, seed: int = 0) -> int:
    """A DiracNet for CIFAR images after one step on noise, with its momentum; gives its number of parameters.

    Batch normalisation has the statistics of that step, so that activations keep their size over any depth.
    """
    torch.manual_seed(seed)
    spec = Spec("cifar", depth, width, "ncrelu", cifar_image(), tuple(f"class {index}" for index in range(10)))
    net = build(spec)
    initialize(net, a=1.0, b=0.1, std=0.03)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of all steps: of the only one
    optimizer = make_optimizer(net, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, decay_ab=True)
    images = torch.randint(256, (BATCH_SIZE, 32, 32, 3), dtype=torch.uint8)
    batch = Batch(0, 0, images, torch.randint(10, (BATCH_SIZE,)))
    train_step(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch, 1e-3)
    # No data set lies beside the checkpoint, so that none is read wherever this runs.
    config = {"dataset": "cifar10", "data_dir": str(path.parent), "seed": seed}
    state = Checkpoint.fresh(spec, net.state_dict(), config, optimizer=optimizer.state_dict(), epoch=1)
    save_checkpoint(path, state)
    return count_parameters(net)
