"""A training step with ordinary convolutions, Dirac ones, and Dirac ones that build the weight as the authors do.

`torchrun --nproc-per-node 2 bench/training_steps.py NUM_STEPS` prints the milliseconds of a step shared by processes.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from bench.lab.process import cost_of
from bench.lab.rounds import Timing, alternate, median_ms, speedup, timing_of, turns
from bench.nets import dirac_spec, reference_form
from bench.training import BATCH_SIZE, FORMS, PRECISIONS
from common.environment import num_cores
from common.spec import ImageSpec, Spec
from train.checkpoint import Checkpoint, save_checkpoint
from train.data.batches import Batch
from train.families import count_parameters, initialized
from train.layers import DiracConv2d
from train.machine import joined, keep_large_buffers
from train.recipes import Precision, Recipe
from train.trainer import make_optimizer, train_step

NUM_WARM_UP, NUM_MEMORY_STEPS = 3, 4
Advance = Callable[..., None]


def digits_spec(depth: int, width: float, *, side: int = 28) -> Spec:
    """A DiracNet for images of one channel."""
    image = ImageSpec(side, side, 1, (0.286,), (0.353,), resize=None)
    return Spec("cifar", depth, width, "ncrelu", image, tuple("0123456789"))


def make_net(form: str, spec: Spec) -> nn.Sequential:
    """A net before its first step, channels last; both Dirac forms start as the same function."""
    torch.manual_seed(0)
    parameterization = "plain" if form == "ordinary" else "dirac"
    net = initialized(replace(spec, parameterization=parameterization), a=1.0, b=0.1, std=0.03)
    if form == "Dirac, reference":
        net = reference_form(net, (DiracConv2d,))
    return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # torch has it


def make_step(
    net: nn.Module,
    image: ImageSpec,
    num_images: int = BATCH_SIZE,
    *,
    precision: Precision = "fp32",
    device: str = "cpu",
    seed: int = 0,
    wrap: Callable[[Any], Any] = lambda net: net,
) -> partial[Tensor]:
    """`train_step` of the net, an optimizer and a batch of noise; `wrap` compiles or shares the net among processes."""
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (num_images, *image.shape), dtype=torch.uint8, device=device)
    batch = Batch(0, 0, pixels, torch.randint(0, 10, (num_images,), device=device))
    recipe = Recipe(lr=1e-3, precision=precision)
    optimizer = make_optimizer(net, recipe)
    scaler = torch.amp.GradScaler(device, enabled=False)
    # The rate is small, so that the loss on random labels stays finite over thousands of steps.
    return partial(train_step, wrap(net), optimizer, scaler, batch, recipe)


def make_checkpoint(depth: int, width: float, path: Path) -> int:
    """A DiracNet for CIFAR images after one step, with its momentum; returns its number of parameters.

    Batch normalisation has the statistics of that step, so that activations keep their size over any depth.
    """
    spec = dirac_spec(depth, width)
    net = make_net("Dirac", spec)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of all steps: of the only one
    step = make_step(net, spec.image, 8)
    step()
    _, optimizer, *_ = step.args
    # No data set lies beside the checkpoint, so that none is read wherever this runs.
    config = {"dataset": "cifar10", "data_dir": str(path.parent), "seed": 0}
    save_checkpoint(path, Checkpoint.fresh(spec, net.state_dict(), config, optimizer=optimizer.state_dict(), epoch=1))
    return count_parameters(net)


def make_weights(form: str, spec: Spec) -> Callable[[], None]:
    """Ŵ of all Dirac layers of a net and the gradients of a, b and W: what the parameterization adds to a step."""
    layers = [layer for layer in make_net(form, spec).modules() if isinstance(layer, DiracConv2d)]
    gradients = [torch.randn_like(layer.weight) for layer in layers]

    def build() -> None:
        for layer, gradient in zip(layers, gradients, strict=True):
            torch.autograd.grad(layer.folded_weight(), (layer.a, layer.b, layer.weight), gradient)

    return build


def time_net(net: tuple[int, float], rounds: int, round_s: float, advance: Advance) -> dict[str, Any]:
    """Steps of every form and precision in one alternation, and Ŵ with its gradients alone."""
    spec, actions = digits_spec(*net), {}
    for precision, form in product(PRECISIONS, FORMS):
        actions[precision, form] = make_step(make_net(form, spec), spec.image, precision=precision)
    for form in FORMS[1:]:
        actions["weights", form] = make_weights(form, spec)
    rows, weights, timings = [], [], _race(actions, rounds, round_s, advance)
    for (precision, form), timing in timings.items():
        if precision == "weights":
            weights.append({"form": form, "round_ms": timing["round_ms"]})
            continue
        share = speedup(timing, over=timings[precision, FORMS[0]])
        rows.append({"precision": precision, "form": form, **timing, "share_of_ordinary": share})
    parameters = count_parameters(make_net("Dirac", spec))
    about = {"name": f"{net[0]}-{net[1]:g}", "images": "28x28", "parameters": parameters}
    return {"net": about, "rows": rows, "weights": weights}


def time_depths(depths: Iterable[int], rounds: int, advance: Advance) -> list[dict[str, Any]]:
    """Steps of Dirac nets of width 1/4 on 8x8 images."""
    specs = {depth: digits_spec(depth, 0.25, side=8) for depth in depths}
    steps = {depth: make_step(make_net("Dirac", spec), spec.image) for depth, spec in specs.items()}
    return [{"depth": depth, **timing} for depth, timing in _race(steps, rounds, 0.1, advance).items()]


def _race(
    actions: Mapping[Any, Callable[[], object]], rounds: int, round_s: float, advance: Advance
) -> dict[Any, Timing]:
    racers = {name: partial(median_ms, action, round_s, min_calls=1) for name, action in actions.items()}
    return alternate(racers, batch_size=BATCH_SIZE, num_rounds=rounds, advance=advance)


def measure_memory(net: tuple[int, float], forms: Iterable[str], advance: Advance) -> list[dict[str, Any]]:
    """Each form in its own process, because a later one would reuse memory that an earlier one has freed."""
    rows, imports = [], ("torch", "bench.training_steps")
    for precision, form in product(PRECISIONS, forms):
        cost = cost_of(imports, _take_steps, form, digits_spec(*net), precision, num_cores())
        rows.append({"precision": precision, "form": form, **cost})
        advance(note=f"{precision}, {form}")
    return rows


def _take_steps(form: str, spec: Spec, precision: str, num_threads: int) -> None:
    keep_large_buffers()
    torch.set_num_threads(num_threads)
    step = make_step(make_net(form, spec), spec.image, precision=precision)
    for _ in range(NUM_MEMORY_STEPS):
        step()


def time_processes(num_starts: int, num_steps: int, advance: Advance) -> list[dict[str, Any]]:
    """One process with a thread per core and two processes with gloo, alternating, each time started anew."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for size in (size for _, sizes in turns((1, 2), num_starts) for size in sizes):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, num_cores() // size))}
        argv = [sys.executable, *launcher, __file__, str(num_steps)]
        done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        times[size].append(float(done.stdout))
        advance(note=f"{size} processes")
    return [{"processes": size, **timing_of(BATCH_SIZE, runs)} for size, runs in times.items()]


def _time_shared_steps(num_steps: int) -> None:
    """Time steps in all processes started by torchrun; the first prints the median in milliseconds."""
    keep_large_buffers()
    with joined("cpu") as world:
        spec = digits_spec(16, 1.0)
        net, share = make_net("Dirac", spec), BATCH_SIZE // world.size
        step = make_step(net, spec.image, share, seed=world.rank, wrap=world.wrap)
        median_ms(step, 0, min_calls=NUM_WARM_UP)
        step_ms = median_ms(step, 0, min_calls=num_steps)
        if world.rank == 0:
            print(step_ms)


if __name__ == "__main__":
    _time_shared_steps(int(sys.argv[1]))
