"""Eq. 6: gradient descent on the Dirac net. Tensors in, numbers out; files are elsewhere."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.data.augment import augment, erase, mix
from train.data.datasets import Part, Split
from train.data.folder import Files
from train.data.stream import stream
from train.distributed import World
from train.layers import DiracConv2d

# The share of all epochs after which the rate falls, and the factor.
STEPS = {
    "wrn": ((0.3, 0.6, 0.8), 0.2),  # epochs 60, 120 and 160 of 200
    "resnet": ((0.3, 0.6, 0.9), 0.1),  # epochs 30, 60 and 90 of 100
}
JUDGED_PIXELS = 2_000_000  # of the images that are judged at once
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
    others: Tensor | None = None  # int64 [N], of the images that are mixed in
    share: float = 1.0  # of an image in its mixture


@dataclass(frozen=True)
class Augmentation:
    flip: bool
    crop: int  # pixels by which crops of images in memory shift
    smallest_crop: float  # the smallest share of a file's image that a crop keeps
    erase: float = 0.0  # the share of images that lose a rectangle
    fill: tuple[int, ...] = ()  # its colour, 0 to 255 per channel
    mixup: float = 0.0
    cutmix: float = 0.0
    balanced: bool = False  # all classes equally often


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
    split: Part,
    augmentation: Augmentation,
    *,
    batch_size: int,
    epoch: int,
    first_step: int,
    seed: int,
    world: World,
    workers: int = 0,
) -> Iterator[Batch]:
    """One epoch from `first_step` on: the part of each batch that falls to this process of `world`.

    What a batch holds depends on (seed, epoch, step) alone, not on how many processes or workers share it.
    Files that cannot be read are missing from it, so that it may be empty, and others are erased and mixed then.
    """
    order = _order(split, np.random.default_rng((seed, epoch)), balanced=augmentation.balanced)
    steps = range(first_step, steps_per_epoch(len(split), batch_size))
    picked = [order[step * batch_size : (step + 1) * batch_size] for step in steps]
    share = batch_size // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    if isinstance(split, Files):
        loaded = stream(
            split,
            [indices[mine] for indices in picked],
            key=(seed, epoch),
            smallest_crop=augmentation.smallest_crop,
            flip=augmentation.flip,
            workers=workers,
        )
    else:
        loaded = _from_memory(split, picked, augmentation, mine, [(seed, epoch, step) for step in steps], world.device)
    for step, (images, targets) in zip(steps, loaded, strict=True):
        images, targets = images.to(world.device), targets.to(world.device)
        if augmentation.erase:
            generator = _keyed((seed, epoch, step, 1))
            images = erase(
                images, augmentation.erase, augmentation.fill, num=batch_size, rows=mine, generator=generator
            )
        if augmentation.mixup or augmentation.cutmix:
            rng = np.random.default_rng((seed, epoch, step, 2))
            yield Batch(epoch, step, *mix(images, targets, augmentation.mixup, augmentation.cutmix, rng))
        else:
            yield Batch(epoch, step, images, targets)


def _order(split: Part, rng: np.random.Generator, *, balanced: bool) -> np.ndarray:
    """An epoch's images: each once, or as many but of each class equally often, rare ones again and again."""
    num = len(split)
    if not balanced:
        return rng.permutation(num)
    targets = torch.as_tensor(split.targets).numpy(force=True)
    of_class = [rng.permutation(np.flatnonzero(targets == target)) for target in np.unique(targets)]
    return rng.permutation(np.concatenate([np.resize(drawn, math.ceil(num / len(of_class))) for drawn in of_class]))[
        :num
    ]


def _from_memory(
    split: Split,
    picked: list[np.ndarray],
    augmentation: Augmentation,
    mine: slice,
    keys: list[tuple[int, ...]],
    device: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Picked and augmented on the device, where `split` already is if `to_device` put it there."""
    pixels, targets = (torch.as_tensor(part, device=device) for part in (split.images, split.targets))
    for indices, key in zip(picked, keys, strict=True):
        rows = torch.from_numpy(indices).to(device)
        images = augment(pixels[rows], flip=augmentation.flip, crop=augmentation.crop, generator=_keyed(key), rows=mine)
        yield images, targets[rows[mine]]


def _keyed(key: tuple[int, ...]) -> torch.Generator:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def to_device(split: Part, device: str) -> Part:
    """Images in memory moved to `device`, once and as bytes; files stay where they are."""
    if isinstance(split, Files):
        return split
    return Split(torch.as_tensor(split.images, device=device), torch.as_tensor(split.targets, device=device))


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
    num_images: float | None = None,
    is_frozen: bool = False,
) -> Tensor:
    """One step of gradient descent; gives [summed loss, right answers] in float64 on the batch's device.

    `num_images` divides the summed loss: the images of a process in this step, on average over all
    processes, whose gradients are averaged as well (default: those of `batch`). An empty batch takes part
    with a gradient of zero. Of a net that `is_frozen` batch statistics stay. Sums stay on the device, so that
    a GPU need not wait for the host after every step.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    net.train(len(batch.targets) > 0 and not is_frozen)  # an empty batch has no statistics
    with torch.autocast(batch.images.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
        logits = net(batch.images)
    logits = logits.float()
    loss, right = _sums(logits, batch.targets, label_smoothing)
    if batch.others is not None:
        other_loss, other_right = _sums(logits, batch.others, label_smoothing)
        loss, right = (torch.lerp(*pair, batch.share) for pair in ((other_loss, loss), (other_right, right)))
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss / (num_images or len(batch.targets))).backward()
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([loss.detach().double(), right.double()])


def _sums(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Summed loss and right answers, both float32."""
    loss = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    return loss, (logits.argmax(1) == targets).sum().float()


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 - decay) · net, batch statistics too; whole numbers are copied."""
    for kept, new in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


@torch.no_grad()
def evaluate(net: nn.Module, split: Part, *, device: str = "cpu", workers: int = 0) -> Score:
    """Loss and accuracy over a split in float32, prepared as the server prepares its images."""
    net.eval()
    sums, num_images = torch.zeros(2, dtype=torch.float64, device=device), 0
    for images, targets in _in_order(split, workers):
        images, targets = images.to(device), targets.to(device)
        sums += torch.stack(_sums(net(images), targets)).double()
        num_images += len(targets)
    loss, correct = (sums / max(1, num_images)).tolist()
    return Score(loss, correct)


@torch.no_grad()
def answers(net: nn.Module, split: Part, *, device: str = "cpu", workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [N, K] and targets int64 [N] of a split, prepared as in `evaluate`; K is 0 of no images."""
    net.eval()
    logits, targets = [np.zeros((0, 0), np.float32)], [np.zeros(0, np.int64)]
    for images, labels in _in_order(split, workers) if len(split) else ():
        logits.append(net(images.to(device)).float().cpu().numpy())
        targets.append(labels.numpy())
    return np.concatenate(logits[1:] or logits), np.concatenate(targets)


def _in_order(split: Part, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    height, width = (split.image.height, split.image.width) if isinstance(split, Files) else split.images.shape[1:3]
    batch_size = max(1, min(500, JUDGED_PIXELS // (height * width)))
    picked = np.array_split(np.arange(len(split)), max(1, math.ceil(len(split) / batch_size)))
    if isinstance(split, Files):
        yield from stream(split, picked, workers=workers)
        return
    for indices in picked:
        yield torch.as_tensor(split.images[indices]), torch.as_tensor(split.targets[indices])
