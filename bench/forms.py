"""A training step in the forms that are raced: Dirac, ordinary, and Dirac as the authors' release builds its weight.

`torchrun --nproc-per-node 2 bench/forms.py NUM_STEPS` times steps that processes share, as one line of JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

from bench.nets import reference_convolution
from common.progress import make_console
from common.spec import ImageSpec
from train.config import TrainConfig
from train.data.batches import Batch
from train.data.datasets import Dataset, DatasetInfo, Split
from train.layers import DiracConv2d
from train.machine import World, joined, keep_large_buffers
from train.trainer import Trainer, train_step

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


SHARED, NUM_WARM_UP = Workload(16, 1.0, 28, 128), 3


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
        for layer in list(trainer.net.modules()):
            for name, child in layer.named_children():
                if isinstance(child, DiracConv2d):
                    setattr(layer, name, reference_convolution(child).to(memory_format=torch.channels_last))
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


def time_shared_steps(num_steps: int) -> None:
    """Time steps of `SHARED` in all processes that torchrun started; the first one prints the median."""
    keep_large_buffers()
    with joined("cpu") as world:
        step, times = make_step("Dirac", SHARED, world), []
        for _ in range(NUM_WARM_UP + num_steps):
            start = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - start))
        if world.rank == 0:
            print(json.dumps({"processes": world.size, "step_ms": statistics.median(times[NUM_WARM_UP:])}))


if __name__ == "__main__":
    time_shared_steps(int(sys.argv[1]))
