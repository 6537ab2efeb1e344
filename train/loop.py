"""Eq. 6: gradient descent on the Dirac net. Tensors in, numbers out; files and batches are elsewhere."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.data.batches import Batch, in_order
from train.data.datasets import Part
from train.layers import DiracConv2d

# The share of all epochs after which the rate falls, and the factor.
STEPS = {
    "wrn": ((0.3, 0.6, 0.8), 0.2),  # epochs 60, 120 and 160 of 200
    "resnet": ((0.3, 0.6, 0.9), 0.1),  # epochs 30, 60 and 90 of 100
}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Score:
    """Cross-entropy per image, and the share of images whose top class is right."""

    loss: float
    accuracy: float


def learning_rate(schedule: str, lr: float, done: float, *, warmup: float = 0.0) -> float:
    """The rate when the fraction `done` of all steps is behind; it rises linearly over the first `warmup`."""
    warm = min(1.0, done / warmup) if warmup else 1.0
    if schedule == "cosine":
        return warm * lr * (1 + math.cos(math.pi * done)) / 2
    milestones, factor = STEPS[schedule]
    return warm * lr * factor ** sum(done >= milestone for milestone in milestones)


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
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    num_images = 0
    for logits, targets in _answers(net, split, device, workers):
        sums += torch.stack(_sums(logits, targets)).double()
        num_images += len(targets)
    loss, correct = (sums / max(1, num_images)).tolist()
    return Score(loss, correct)


def answers(net: nn.Module, split: Part, *, device: str = "cpu", workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [N, K] and targets int64 [N] of a split, prepared as in `evaluate`; K is 0 of no images."""
    if not len(split):
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
    logits, targets = zip(*_answers(net, split, device, workers), strict=True)
    return torch.cat(logits).float().numpy(force=True), torch.cat(targets).numpy(force=True)


@torch.no_grad()
def _answers(net: nn.Module, split: Part, device: str, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets of a split, batch by batch, on the device."""
    net.eval()
    for images, targets in in_order(split, workers):
        yield net(images.to(device)), targets.to(device)
