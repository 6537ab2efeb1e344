"""What trains a net, and the steps of an epoch."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from common.refusal import Refusal
from common.spec import ImageSpec, Spec
from train.checkpoint import Checkpoint, load_net, save_checkpoint
from train.config import Settings
from train.data import datasets
from train.distributed import World
from train.initialize import initialized
from train.loop import Augmentation, batches, follow, learning_rate, make_optimizer, steps_per_epoch, train_step


@dataclass(frozen=True)
class Session:
    """What stays the same from the first step of a run to its last."""

    config: Settings
    net: nn.Sequential
    judged: nn.Sequential  # the running average of `net`, or `net` itself
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    world: World
    console: Console

    def snapshot(self, state: Checkpoint, **moment: Any) -> Checkpoint:
        return replace(
            state,
            model=self.net.state_dict(),
            average={} if self.judged is self.net else self.judged.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            rng_state=torch.get_rng_state(),
            # Of the net that it was:
            test_accuracy=None,
            spec=replace(state.spec, temperature=1.0),
            calibration={},
            **moment,
        )

    def save(self, name: str, state: Checkpoint) -> None:
        if self.world.rank == 0:
            save_checkpoint(self.config.run_dir / name, state)


@dataclass(frozen=True)
class Step:
    """What one step of an epoch did in this process."""

    number: int  # within the epoch
    lr: float
    images: int
    sums: torch.Tensor  # [loss, right answers], float64


def start(config: Settings, spec: Spec, world: World, console: Console, source: Checkpoint | None = None) -> Session:
    """A net of `spec` before its first step, with the layers of `source`, and what trains it.

    Its classifier comes along where the classes are the same.
    """
    torch.manual_seed(config.seed)
    net = initialized(spec, a=config.a0, b=config.b0, std=config.w_std, start=config.start)
    if source:
        learnt = load_net(source).state_dict()
        if source.spec.labels != spec.labels:
            learnt = {name: tensor for name, tensor in learnt.items() if not name.startswith("fc.")}
        net.load_state_dict(net.state_dict() | learnt)
    net = net.to(world.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # torch has it
    decay_ab = config.decay_ab == "yes" or (config.decay_ab == "auto" and spec.parameterization != "per-channel")
    optimizer = make_optimizer(
        net,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov == "yes",
        weight_decay=config.weight_decay,
        decay_ab=decay_ab,
    )
    scaler = torch.amp.GradScaler(world.device.split(":")[0], enabled=config.precision == "fp16")
    judged = deepcopy(net).eval() if config.ema else net
    return Session(config, net, judged, optimizer, scaler, world, console)


def take_steps(
    session: Session,
    net: nn.Module,
    split: datasets.Part,
    augmentation: Augmentation,
    *,
    batch_size: int,
    epoch: int,
    first: int = 0,
) -> Iterator[Step]:
    """Train `net`, the session's own as it was wrapped, from step `first` to the end of an epoch.

    A step is left out by all processes together, where none of them could read a file of its batch.
    """
    config, world = session.config, session.world
    num_steps = steps_per_epoch(len(split), batch_size)
    for batch in batches(
        split,
        augmentation,
        batch_size=batch_size,
        epoch=epoch,
        first_step=first,
        seed=config.seed,
        world=world,
        workers=config.workers,
    ):
        # The rate of a step is that at its middle: the first of a warm-up is not zero.
        done = (epoch + (batch.step + 0.5) / num_steps) / config.epochs
        lr = learning_rate(config.schedule, config.lr, done, warmup=config.warmup / config.epochs)
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        if num_images := world.count(len(batch.targets)):
            sums = train_step(
                net,
                session.optimizer,
                session.scaler,
                batch,
                lr,
                precision=config.precision,
                label_smoothing=config.label_smoothing,
                num_images=num_images / world.size,
                is_frozen=epoch < config.freeze,
            )
            if config.ema:
                num_taken = epoch * num_steps + batch.step
                follow(session.judged, session.net, min(config.ema, (1 + num_taken) / (10 + num_taken)))
        yield Step(batch.step, lr, len(batch.targets), sums)


def make_augmentation(config: Settings, info: datasets.DatasetInfo) -> Augmentation:
    """What `config` says of flips and crops, or what suits the data set."""
    crop = info.crop if config.crop is None else config.crop
    if crop >= min(info.image.height, info.image.width):
        raise Refusal(f"--crop must be smaller than the image, got {crop}")
    flip = info.flip if config.flip == "auto" else config.flip == "yes"
    fill = tuple(round(255 * mean) for mean in info.image.mean)
    return Augmentation(
        flip, crop, config.smallest_crop, config.erase, fill, config.mixup, config.cutmix, config.balanced
    )


def make_spec(config: Settings, image: ImageSpec, labels: tuple[str, ...]) -> Spec:
    """The net that `config` asks for, on these images."""
    return Spec(
        family=config.family,
        depth=config.depth,
        width=config.width,
        nonlinearity=config.nonlinearity,
        parameterization=config.parameterization,
        delta=config.delta,
        image=image,
        labels=labels,
    )
