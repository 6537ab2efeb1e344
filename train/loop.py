"""Eq. 6: gradient descent on the Dirac net. Tensors in, numbers out; files are elsewhere."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.augment import augment
from train.data import Split

STEP_MILESTONES = (0.3, 0.6, 0.8)  # epochs 60, 120 and 160 of 200, as Wide ResNet
STEP_FACTOR = 0.2


@dataclass(frozen=True)
class Score:
    """Cross-entropy per image, and the share of images whose top class is right."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Batch:
    epoch: int
    step: int  # within the epoch
    images: Tensor  # uint8 [N, H, W, C], augmented
    targets: Tensor  # int64 [N]


def learning_rate(schedule: str, lr: float, done: float) -> float:
    """The rate when the fraction `done` of all steps is behind."""
    if schedule == "cosine":
        return lr * (1 + float(np.cos(np.pi * done))) / 2
    return lr * STEP_FACTOR ** sum(done >= milestone for milestone in STEP_MILESTONES)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches only: each epoch leaves other images out."""
    return max(1, num_images // batch_size)


def batches(
    split: Split,
    *,
    batch_size: int,
    epoch: int,
    first_step: int,
    seed: int,
    flip: bool,
    crop: int,
    device: str,
) -> Iterator[Batch]:
    """One epoch from `first_step` on. What a batch holds depends on (seed, epoch, step) alone."""
    order = np.random.default_rng((seed, epoch)).permutation(len(split))
    for step in range(first_step, steps_per_epoch(len(split), batch_size)):
        picked = order[step * batch_size : (step + 1) * batch_size]
        keyed = int(np.random.SeedSequence((seed, epoch, step)).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(keyed)
        images = torch.from_numpy(split.images[picked]).to(device)
        targets = torch.from_numpy(split.targets[picked]).to(device)
        yield Batch(epoch, step, augment(images, flip=flip, crop=crop, generator=generator), targets)


def make_optimizer(net: nn.Module, *, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """One weight decay on all parameters, a and b and batch normalisation's too (eq. 6); no Nesterov."""
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float) -> tuple[float, int]:
    """One step of gradient descent; gives the summed loss and the number of right answers."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    net.train()
    logits = net(batch.images)
    loss = functional.cross_entropy(logits, batch.targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item() * len(batch.targets), int((logits.argmax(1) == batch.targets).sum())


@torch.no_grad()
def evaluate(net: nn.Module, split: Split, *, device: str = "cpu", batch_size: int = 500) -> Score:
    """Loss and accuracy over a split, without augmentation."""
    net.eval()
    loss, correct = 0.0, 0
    for start in range(0, len(split), batch_size):
        images = torch.from_numpy(split.images[start : start + batch_size]).to(device)
        targets = torch.from_numpy(split.targets[start : start + batch_size]).to(device)
        logits = net(images)
        loss += functional.cross_entropy(logits, targets, reduction="sum").item()
        correct += int((logits.argmax(1) == targets).sum())
    return Score(loss / len(split), correct / len(split))
