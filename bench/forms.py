"""A training step in the forms that are raced: Dirac, ordinary, and Dirac as the authors' release builds its weight.

`torchrun --nproc-per-node 2 bench/forms.py NUM_STEPS` times steps that processes share, as one line of JSON.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

from bench.lab.process import cost_of
from bench.nets import reference_convolution
from bench.rounds import Timing, alternate_all, median_ms
from bench.training import BATCH_SIZE, FORMS, PRECISIONS
from common.cores import num_cores
from common.progress import make_console
from common.spec import ImageSpec
from train.config import TrainConfig
from train.data.batches import Batch
from train.data.datasets import Dataset, DatasetInfo, Split
from train.distributed import World, joined
from train.families import count_parameters
from train.layers import DiracConv2d
from train.loop import train_step
from train.machine import keep_large_buffers
from train.trainer import Trainer

ALONE = World()
NUM_WARM_UP, NUM_MEMORY_STEPS = 3, 4
Advance = Callable[..., None]


@dataclass(frozen=True)
class Workload:
    """Which net learns from what: random images of `side` pixels and one channel."""

    depth: int
    width: float
    side: int = 28
    batch_size: int = BATCH_SIZE
    precision: str = "fp32"


def time_net(net: tuple[int, float], rounds: int, round_s: float, advance: Advance) -> dict[str, Any]:
    """Steps of every form and precision in one alternation, and Ŵ with its gradients alone."""
    workload, cases = Workload(*net), list(product(PRECISIONS, FORMS))
    actions: dict[Any, Any] = {
        (precision, form): make_step(form, replace(workload, precision=precision)) for precision, form in cases
    }
    actions |= {form: make_weights(form, workload) for form in FORMS[1:]}
    timings = _race(actions, rounds, round_s, advance)
    rows = []
    for precision, form in cases:
        timing = timings[precision, form]
        share = timing.speedup_over(timings[precision, FORMS[0]])
        rows.append({"precision": precision, "form": form, **timing.to_dict(), "share_of_ordinary": share})
    weights = [{"form": form, "round_ms": list(timings[form].round_ms)} for form in FORMS[1:]]
    parameters = count_parameters(make_trainer("Dirac", workload).net)
    about = {"name": f"{net[0]}-{net[1]:g}", "images": f"{workload.side}x{workload.side}", "parameters": parameters}
    return {"net": about, "rows": rows, "weights": weights}


def time_depths(depths: Iterable[int], rounds: int, advance: Advance) -> list[dict[str, Any]]:
    steps = {depth: make_step("Dirac", Workload(depth, 0.25, 8)) for depth in depths}
    return [{"depth": depth, **timing.to_dict()} for depth, timing in _race(steps, rounds, 0.1, advance).items()]


def measure_memory(net: tuple[int, float], forms: Iterable[str], advance: Advance) -> list[dict[str, Any]]:
    """Each form in a process of its own, as the next one would reuse memory that one has freed."""
    rows = []
    for precision, form in product(PRECISIONS, forms):
        cost = cost_of(("torch", "bench.forms"), _take_steps, form, Workload(*net, precision=precision), num_cores())
        rows.append({"precision": precision, "form": form, **asdict(cost), "own_bytes": cost.own_bytes})
        advance(note=f"{precision}, {form}")
    return rows


def time_processes(num_starts: int, num_steps: int, advance: Advance) -> list[dict[str, Any]]:
    """One process with a thread for each core against two processes with gloo, in turns, each started afresh."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for size in ((1, 2, 2, 1) * num_starts)[: 2 * num_starts]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, num_cores() // size))}
        argv = [sys.executable, *launcher, __file__, str(num_steps)]
        done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        times[size].append(json.loads(done.stdout)["step_ms"])
        advance(note=f"{size} processes")
    return [{"processes": size, **Timing(BATCH_SIZE, tuple(runs)).to_dict()} for size, runs in times.items()]


def make_trainer(form: str, workload: Workload, world: World = ALONE) -> Trainer:
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


def make_step(form: str, workload: Workload, world: World = ALONE) -> Callable[[], Tensor]:
    """Forward, backward and optimizer on this process's share of a batch that stays the same."""
    trainer = make_trainer(form, workload, world)
    net, share = world.wrap(trainer.net), workload.batch_size // world.size
    generator = torch.Generator().manual_seed(world.rank)
    shape = (share, workload.side, workload.side, 1)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    batch = Batch(0, 0, images, torch.randint(10, (share,), generator=generator))
    # The rate is small, so that the loss on random labels stays finite over thousands of steps.
    return lambda: train_step(net, trainer.optimizer, trainer.scaler, batch, 1e-3, precision=workload.precision)


def make_weights(form: str, workload: Workload) -> Callable[[], None]:
    """Ŵ of all Dirac layers of a net and the gradients of a, b and W: what the parameterization adds to a step."""
    layers = [layer for layer in make_trainer(form, workload).net.modules() if isinstance(layer, DiracConv2d)]
    gradients = [torch.randn_like(layer.weight) for layer in layers]

    def build() -> None:
        for layer, gradient in zip(layers, gradients, strict=True):
            torch.autograd.grad(layer.folded_weight(), (layer.a, layer.b, layer.weight), gradient)

    return build


def _race(
    actions: Mapping[Any, Callable[[], object]], num_rounds: int, round_s: float, advance: Advance
) -> dict[Any, Timing]:
    racers = {name: partial(median_ms, action, round_s, min_calls=1) for name, action in actions.items()}
    return alternate_all(racers, batch_size=BATCH_SIZE, num_rounds=num_rounds, advance=advance)


def _take_steps(form: str, workload: Workload, num_threads: int) -> None:
    """In a process whose memory is measured."""
    keep_large_buffers()
    torch.set_num_threads(num_threads)
    step = make_step(form, workload)
    for _ in range(NUM_MEMORY_STEPS):
        step()


def _time_shared_steps(num_steps: int) -> None:
    """Time steps in all processes that torchrun started; the first one prints the median."""
    keep_large_buffers()
    with joined("cpu") as world:
        step, times = make_step("Dirac", Workload(16, 1.0), world), []
        for _ in range(NUM_WARM_UP + num_steps):
            start = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - start))
        if world.rank == 0:
            print(json.dumps({"processes": world.size, "step_ms": median(times[NUM_WARM_UP:])}))


if __name__ == "__main__":
    _time_shared_steps(int(sys.argv[1]))
