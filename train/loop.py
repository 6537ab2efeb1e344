"""Eq. 6: gradient descent on the Dirac net. Tensors in, numbers out; files are elsewhere."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.augment import augment
from train.data import Split
from train.folder import Files
from train.layers import DiracConv2d
from train.stream import stream

# The share of all epochs after which the rate falls, and the factor.
STEPS = {
    "wrn": ((0.3, 0.6, 0.8), 0.2),  # epochs 60, 120 and 160 of 200
    "resnet": ((1 / 3, 2 / 3), 0.1),  # epochs 30 and 60 of 90
}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


@dataclass(frozen=True)
class Augmentation:
    flip: bool
    crop: int  # pixels by which crops of images in memory shift
    smallest_crop: float  # the smallest share of a file's image that a crop keeps


def learning_rate(schedule: str, lr: float, done: float, *, warmup: float = 0.0) -> float:
    """The rate when the fraction `done` of all steps is behind; it rises linearly over the first `warmup`."""
    warm = min(1.0, done / warmup) if warmup else 1.0
    if schedule == "cosine":
        return warm * lr * (1 + math.cos(math.pi * done)) / 2
    milestones, factor = STEPS[schedule]
    return warm * lr * factor ** sum(done >= milestone for milestone in milestones)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches only: each epoch leaves other images out."""
    return max(1, num_images // batch_size)


def batches(
    split: Split | Files,
    augmentation: Augmentation,
    *,
    batch_size: int,
    epoch: int,
    first_step: int,
    seed: int,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """One epoch from `first_step` on: the part of each batch that falls to process `rank` of `world_size`.

    What a batch holds depends on (seed, epoch, step) alone, not on how many processes or workers share it.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(split))
    steps = range(first_step, steps_per_epoch(len(split), batch_size))
    share = batch_size // world_size
    mine = slice(rank * share, (rank + 1) * share)
    if isinstance(split, Files):
        picked = [order[step * batch_size : (step + 1) * batch_size][mine] for step in steps]
        loader = stream(
            split,
            picked,
            key=(seed, epoch),
            smallest_crop=augmentation.smallest_crop,
            flip=augmentation.flip,
            workers=workers,
        )
        for step, (pixels, targets) in zip(steps, loader, strict=True):
            if len(targets):
                yield Batch(epoch, step, pixels.to(device), targets.to(device))
        return
    # The whole set goes to the device once an epoch; every batch is picked and augmented there.
    pixels, targets = torch.from_numpy(split.images).to(device), torch.from_numpy(split.targets).to(device)
    for step in steps:
        picked = torch.from_numpy(order[step * batch_size : (step + 1) * batch_size]).to(device)
        keyed = int(np.random.SeedSequence((seed, epoch, step)).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(keyed)
        images = augment(pixels[picked], flip=augmentation.flip, crop=augmentation.crop, generator=generator, rows=mine)
        yield Batch(epoch, step, images, targets[picked[mine]])


def make_optimizer(
    net: nn.Module, *, lr: float, momentum: float, nesterov: bool, weight_decay: float, decay_ab: bool
) -> torch.optim.SGD:
    """One weight decay on all parameters, batch normalisation's too (eq. 6); on `a` and `b` if `decay_ab`."""
    scales = {
        id(scale)
        for layer in net.modules()
        if isinstance(layer, DiracConv2d)
        for scale in (layer.a, layer.b)
        if not decay_ab and scale is not None
    }
    decayed = [parameter for parameter in net.parameters() if id(parameter) not in scales]
    free = [parameter for parameter in net.parameters() if id(parameter) in scales]
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    lr: float,
    *,
    precision: str = "fp32",
    label_smoothing: float = 0.0,
) -> Tensor:
    """One step of gradient descent; gives [summed loss, right answers] in float64 on the batch's device.

    Sums stay on the device, so that a GPU need not wait for the host after every step.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    net.train()
    with torch.autocast(batch.images.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
        logits = net(batch.images)
    logits = logits.float()
    loss = functional.cross_entropy(logits, batch.targets, label_smoothing=label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    right = (logits.argmax(1) == batch.targets).sum()
    return torch.stack([loss.detach().double() * len(batch.targets), right.double()])


@torch.no_grad()
def evaluate(
    net: nn.Module, split: Split | Files, *, device: str = "cpu", batch_size: int = 500, workers: int = 0
) -> Score:
    """Loss and accuracy over a split in float32, prepared as the server prepares its images."""
    net.eval()
    sums, num_images = torch.zeros(2, dtype=torch.float64, device=device), 0
    for images, targets in _in_order(split, batch_size, workers):
        images, targets = images.to(device), targets.to(device)
        logits = net(images)
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([loss.double(), (logits.argmax(1) == targets).sum().double()])
        num_images += len(targets)
    loss, correct = (sums / max(1, num_images)).tolist()
    return Score(loss, correct)


def _in_order(split: Split | Files, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    picked = np.array_split(np.arange(len(split)), math.ceil(len(split) / batch_size))
    if isinstance(split, Files):
        yield from stream(split, picked, workers=workers)
        return
    for indices in picked:
        yield torch.from_numpy(split.images[indices]), torch.from_numpy(split.targets[indices])
