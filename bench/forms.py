"""A training step in the forms that are raced: Dirac, ordinary, and Dirac as the authors' release builds its weight."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.progress import make_console
from common.spec import ImageSpec
from train.config import TrainConfig
from train.data.batches import Batch
from train.data.datasets import Dataset, DatasetInfo, Split
from train.distributed import World
from train.layers import DiracConv2d
from train.loop import train_step
from train.machine import keep_large_buffers
from train.trainer import Trainer

Form = Literal["ordinary", "Dirac", "Dirac, reference"]
ALONE = World()


@dataclass(frozen=True)
class Workload:
    """Which net learns from what: random images of `side` pixels and one channel."""

    depth: int
    width: float
    side: int
    batch_size: int
    precision: str = "fp32"

    @property
    def title(self) -> str:
        return f"{self.depth}-{self.width:g}, {self.side}x{self.side}, {self.precision}"


class ReferenceDiracConv2d(DiracConv2d):
    """Eq. 4 term by term: a and b expanded to a value per filter, δ dense, filters normalised as rows of a matrix."""

    def folded_weight(self) -> Tensor:
        a, b = (scale.expand(self.out_channels).view(-1, 1, 1, 1) for scale in (self.a, self.b))
        normalized = functional.normalize(self.weight.flatten(1)).view(self.weight.shape)
        return a.expand_as(self.delta) * self.delta + b.expand_as(normalized) * normalized


def make_session(form: Form, workload: Workload, world: World = ALONE) -> Trainer:
    """A net before its first step, as train/run.py makes it."""
    config = TrainConfig(
        dataset="fashion-mnist",
        depth=workload.depth,
        width=workload.width,
        precision=workload.precision,
        parameterization="plain" if form == "ordinary" else "dirac",
    ).resolved()
    image = ImageSpec(workload.side, workload.side, 1, (0.286,), (0.353,), resize=None)
    info = DatasetInfo(image, tuple("0123456789"), flip=False, crop=0)
    some = Split(np.zeros((world.size, *image.shape), np.uint8), np.zeros(world.size))  # each step brings its own
    dataset = Dataset(info, train=some, test=some, validation=some)
    trainer = Trainer(config, config.spec(image, info.labels), dataset, world, make_console(quiet=True))
    if form == "Dirac, reference":
        _use_reference(trainer.net)
    return trainer


def make_step(form: Form, workload: Workload, world: World = ALONE) -> Callable[[], Tensor]:
    """Forward, backward and optimizer on this process's share of a batch that stays the same."""
    trainer = make_session(form, workload, world)
    net, share = world.wrap(trainer.net), workload.batch_size // world.size
    generator = torch.Generator().manual_seed(world.rank)
    shape = (share, workload.side, workload.side, 1)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    batch = Batch(0, 0, images, torch.randint(10, (share,), generator=generator))
    # The rate is small: the loss shall not run away from random labels while thousands of steps are timed.
    return lambda: train_step(net, trainer.optimizer, trainer.scaler, batch, 1e-3, precision=workload.precision)


def make_weights(form: Form, workload: Workload) -> Callable[[], None]:
    """Ŵ of all Dirac layers of a net and the gradients of a, b and W: what the parameterization adds to a step."""
    net = make_session(form, workload).net
    layers = [layer for layer in net.modules() if isinstance(layer, DiracConv2d)]
    gradients = [torch.randn_like(layer.weight) for layer in layers]

    def build() -> None:
        for layer, gradient in zip(layers, gradients, strict=True):
            torch.autograd.grad(layer.folded_weight(), (layer.a, layer.b, layer.weight), gradient)

    return build


def take(num_steps: int, form: Form, workload: Workload, num_threads: int) -> None:
    """Train for a few steps, for whoever measures the process."""
    keep_large_buffers()
    torch.set_num_threads(num_threads)
    step = make_step(form, workload)
    for _ in range(num_steps):
        step()


def _use_reference(net: nn.Module) -> None:
    """Put reference layers in place of ours; they share the parameters that the optimizer holds."""
    for layer in list(net.modules()):
        for name, child in layer.named_children():
            if isinstance(child, DiracConv2d):
                twin = ReferenceDiracConv2d(child.in_channels, child.out_channels, child.kernel_size, padding=1)
                twin.a, twin.b = child.a, child.b
                twin.register_parameter("weight", child.weight)
                setattr(layer, name, twin.to(memory_format=torch.channels_last))
