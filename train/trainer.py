"""A net in training: set up, trained step by step (eq. 6) and epoch by epoch, validated, saved and resumed."""

import math
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from common.progress import progress
from common.refusal import Refusal, one_line
from common.spec import Spec
from train.checkpoint import Checkpoint, PlainFile, load_net, save_checkpoint
from train.config import Settings
from train.data.batches import Batch, batches, in_order, steps_per_epoch, to_device
from train.data.datasets import Dataset, Part
from train.families import initialized
from train.fine_tune.fake_quantize import FakeQuantized
from train.fine_tune.from_plain import NUM_MEASURED, open_plain
from train.layers import DiracConv2d
from train.machine import World
from train.recipes import Recipe

# The share of all epochs after which the rate falls, and the factor.
STEPS = {
    "wrn": ((0.3, 0.6, 0.8), 0.2),  # epochs 60, 120 and 160 of 200
    "resnet": ((0.3, 0.6, 0.9), 0.1),  # epochs 30, 60 and 90 of 100
}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
NO_TOTALS = {"loss": 0.0, "correct": 0, "images": 0, "seconds": 0.0}


class Trainer:
    """A net in training and all that changes with its steps.

    `epoch` trains, `save` writes the whole state, `resume` takes it up again bit for bit; `fine_tune` starts from
    the layers of another net.
    """

    def __init__(self, settings: Settings, spec: Spec, dataset: Dataset, world: World, console: Console) -> None:
        assert dataset.validation is not None  # `divide` made it
        if settings.patience and not len(dataset.validation):
            raise Refusal("--patience waits for the validation accuracy, and no image is held out: raise --validation")
        if (settings.crop or 0) >= min(dataset.info.image.shape[:2]):
            raise Refusal(f"--crop must be smaller than the image, got {settings.crop}")
        num = len(dataset.train)
        if num < world.size:
            raise Refusal(f"{num} training images are too few for {world.size} processes")
        settings = replace(settings, batch_size=min(settings.batch_size, num // world.size * world.size))
        self.num_steps = steps_per_epoch(num, settings.batch_size)
        self.settings, self.spec, self.dataset, self.world, self.console = settings, spec, dataset, world, console
        self.images, self.held_out = (to_device(part, world.device) for part in (dataset.train, dataset.validation))
        torch.manual_seed(settings.seed)
        net = initialized(spec, a=settings.a0, b=settings.b0, std=settings.w_std, start=settings.start)
        self.net = net.to(world.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # torch has it
        self.judged = deepcopy(self.net).eval() if settings.ema else self.net  # the running average
        self.wrapped: nn.Module | None = None  # `net` as it is trained: rounded, shared by processes, compiled
        decays = {"yes": True, "no": False, "auto": spec.parameterization != "per-channel"}
        self.optimizer = make_optimizer(self.net, settings, decay_ab=decays[settings.decay_ab])
        self.scaler = torch.amp.GradScaler(world.device.split(":")[0], enabled=settings.precision == "fp16")
        self.record: dict[str, Any] = {}  # of the run, for its checkpoint
        self.history: list[dict[str, Any]] = []
        self.epochs_done, self.steps_done, self.totals = 0, 0, NO_TOTALS  # steps and totals: of the epoch under way
        self.is_stopped = False  # set it to end between two steps

    def epoch(self) -> dict[str, Any] | None:
        """Train to the end of an epoch and validate; gives its row of the history, None if it was stopped before."""
        settings, world, number = self.settings, self.world, self.epochs_done
        if self.wrapped is None or number == settings.freeze:
            self.wrapped = self._wrap(is_frozen=number < settings.freeze)
        images, sums, lr = 0, torch.zeros(2, dtype=torch.float64, device=world.device), 0.0
        start, title = time.monotonic(), f"epoch {number + 1}/{settings.epochs}"
        with progress(self.console, title, self.num_steps, done=self.steps_done) as advance:
            for batch in self._batches(world):
                # The rate of a step is that at its middle: the first of a warm-up is not zero.
                done = (number + (batch.step + 0.5) / self.num_steps) / settings.epochs
                lr = learning_rate(settings.schedule, settings.lr, done, warmup=settings.warmup / settings.epochs)
                sums, images = sums + self._step(self.wrapped, batch, lr), images + len(batch.targets)
                self.steps_done = batch.step + 1
                advance(note=f"{images * world.size / (time.monotonic() - start):.0f} images/s")
                if world.any(self.is_stopped):
                    break
        loss, correct, images = world.sum(torch.cat([sums, sums.new_tensor([images])])).tolist()
        fresh = {"loss": loss, "correct": correct, "images": images, "seconds": time.monotonic() - start}
        self.totals = {key: self.totals[key] + value for key, value in fresh.items()} | {"lr": lr}
        return self._close_epoch() if self.steps_done == self.num_steps else None

    def save(self, name: str) -> None:
        """The whole state, as file `name` of the run; the first process writes it."""
        state = Checkpoint(
            spec=self.spec,
            model=self.net.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            config=self.record,
            epoch=self.epochs_done,
            step=self.steps_done,
            totals=self.totals,
            history=self.history,
            rng_state=torch.get_rng_state(),
            average={} if self.judged is self.net else self.judged.state_dict(),
        )
        if self.world.rank == 0:
            save_checkpoint(self.settings.run_dir / name, state)

    def resume(self, state: Checkpoint) -> None:
        """Go on where `state` was saved."""
        try:
            self.net.load_state_dict(state.model)
            if self.judged is not self.net:
                self.judged.load_state_dict(state.average)
            self.optimizer.load_state_dict(state.optimizer)
            self.scaler.load_state_dict(state.scaler)
        except (RuntimeError, ValueError, KeyError) as error:
            raise Refusal(f"{self.settings.run_dir} does not fit its own spec: {one_line(error)}") from error
        torch.set_rng_state(state.rng_state)
        self.record, self.history = state.config | {"epochs": self.settings.epochs}, state.history
        self.epochs_done, self.steps_done, self.totals = state.epoch, state.step, state.totals
        if state.test_accuracy is not None and state.epoch < self.settings.epochs:
            self.console.print(
                f"the test images were read after epoch {state.epoch}: anything chosen from now on has seen them"
            )

    def fine_tune(self, source: Checkpoint | PlainFile) -> None:
        """Start from the layers of another net; from its classifier too where the classes are the same."""
        if isinstance(source, PlainFile):
            alone = World(device=self.world.device)  # whole batches: all processes measure the same
            first = islice(self._batches(alone), -(-NUM_MEASURED // self.settings.batch_size))
            source = open_plain(source, self.settings, self.dataset, first, alone.device, self.console)
        learnt = load_net(source).state_dict()
        if source.spec.labels != self.spec.labels:
            learnt = {name: tensor for name, tensor in learnt.items() if not name.startswith("fc.")}
        for net in (self.net, self.judged):
            net.load_state_dict(net.state_dict() | learnt)
        self.record["init_sha256"] = source.sha256
        if "unfold" in source.config:
            self.record["unfold"] = source.config["unfold"]

    def since_best(self) -> int:
        """Epochs since the best by held-out accuracy, then loss; 0 where nothing is held out: the last is the best."""
        if not self.history or self.history[-1]["validation_accuracy"] is None:
            return 0
        ranks = [(row["validation_accuracy"], -row["validation_loss"]) for row in self.history]
        return len(ranks) - 1 - ranks.index(max(ranks))

    def _wrap(self, *, is_frozen: bool) -> nn.Module:
        """The net as it is trained: all of it, or its last layer alone."""
        self.net.requires_grad_(not is_frozen)
        self.net.get_submodule("fc").requires_grad_(True)
        net = FakeQuantized(self.net) if self.settings.qat else self.net
        net = self.world.wrap(net, sync_batch_norm=self.settings.sync_batch_norm)
        if self.settings.compile:
            net = torch.compile(net)  # a Module, whatever torch's annotations say
            assert isinstance(net, nn.Module)
        return net

    def _batches(self, world: World) -> Iterator[Batch]:
        """The rest of the current epoch: the share of this process of `world` in each batch."""
        return batches(
            self.images, self.settings, self.dataset.info, world, epoch=self.epochs_done, first_step=self.steps_done
        )

    def _step(self, net: nn.Module, batch: Batch, lr: float) -> Tensor:
        """[summed loss, right answers] of this process, float64.

        If no process can read a file of a batch, all of them skip the step.
        """
        settings, world = self.settings, self.world
        num_images = world.count(len(batch.targets))
        if not num_images:
            return torch.zeros(2, dtype=torch.float64, device=world.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        share, is_frozen = num_images / world.size, batch.epoch < settings.freeze
        sums = train_step(net, self.optimizer, self.scaler, batch, settings, num_images=share, is_frozen=is_frozen)
        if settings.ema:
            num_taken = batch.epoch * self.num_steps + batch.step
            follow(self.judged, self.net, min(settings.ema, (1 + num_taken) / (10 + num_taken)))
        return sums

    def _close_epoch(self) -> dict[str, Any]:
        """Validate, and add a row to the history."""
        totals, number = self.totals, self.epochs_done + 1
        num_picked = self.settings.batch_size * self.num_steps
        if lost := round(num_picked - totals["images"]):
            self.console.print(f"epoch {number}: {lost} of {num_picked} images could not be read")
        if not totals["images"]:
            raise Refusal(f"none of the {num_picked} training images of epoch {number} could be read: repair them")
        loss, accuracy = None, None
        if len(self.held_out):  # measured by the first process and known to all
            score, device = Score(0.0, 0.0), self.world.device
            if self.world.rank == 0:
                score = evaluate(self.judged, self.held_out, device=device, workers=self.settings.workers)
            numbers = torch.tensor([score.loss, score.accuracy], dtype=torch.float64, device=device)
            loss, accuracy = self.world.sum(numbers).tolist()
        row: dict[str, Any] = {
            "epoch": number,
            "train_loss": totals["loss"] / totals["images"],
            "train_accuracy": totals["correct"] / totals["images"],
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "lr": totals["lr"],
            "images_per_s": totals["images"] / totals["seconds"],
            "seconds": totals["seconds"],
        }
        self.history = [*self.history, row]
        self.epochs_done, self.steps_done, self.totals = number, 0, NO_TOTALS
        return row


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


def make_optimizer(net: nn.Module, recipe: Recipe, *, decay_ab: bool = True) -> torch.optim.SGD:
    """One weight decay on all parameters, batch normalisation's too (eq. 6); on `a` and `b` if `decay_ab`."""
    layers = [layer for layer in net.modules() if isinstance(layer, DiracConv2d) and not decay_ab]
    scales = {id(scale) for layer in layers for scale in (layer.a, layer.b)}
    decayed = [parameter for parameter in net.parameters() if id(parameter) not in scales]
    free = [parameter for parameter in net.parameters() if id(parameter) in scales]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov == "yes")


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    recipe: Recipe,
    *,
    num_images: float | None = None,
    is_frozen: bool = False,
) -> Tensor:
    """One step of gradient descent; gives [summed loss, right answers] in float64 on the batch's device.

    Of `recipe`, precision and label smoothing; the rate is the optimizer's. `num_images` divides the summed loss: the
    images of a process in this step, on average over all processes, whose gradients are averaged as well (default:
    those of `batch`). An empty batch takes part with a gradient of zero. Of a net that `is_frozen` batch statistics
    stay. Sums stay on the device, so that a GPU need not wait for the host after every step.
    """
    kind = AUTOCAST.get(recipe.precision)
    net.train(len(batch.targets) > 0 and not is_frozen)  # an empty batch has no statistics
    with torch.autocast(batch.images.device.type, kind, enabled=kind is not None):
        logits = net(batch.images)
    logits = logits.float()
    loss, right = _sums(logits, batch.targets, recipe.label_smoothing)
    if batch.others is not None:
        other_loss, other_right = _sums(logits, batch.others, recipe.label_smoothing)
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
