"""One training run from start or checkpoint to its last file."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from train import data
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.config import TrainConfig
from train.families import build, count_parameters
from train.loop import batches, evaluate, learning_rate, make_optimizer, steps_per_epoch, train_step
from train.progress import make_console, progress, track
from train.refusal import Refusal
from train.report import describe_row, draw_learning_curve, write_metrics
from train.spec import Spec

# What may differ between a run and its resumption without changing a single bit of it.
FREE_TO_CHANGE = ("data_dir", "download", "device", "out", "resume", "json", "describe")


def describe(config: TrainConfig) -> int:
    """Print the spec and its number of parameters."""
    if config.classes is None:
        info = data.describe(config.dataset, data_dir=config.data_dir, image_size=config.image_size)
        image, labels = info.image, info.labels
    else:
        image, labels = data.cifar_image(), tuple(f"class {index}" for index in range(config.classes))
    spec = _spec(config, image, labels)
    with torch.device("meta"):
        parameters = count_parameters(build(spec))
    if config.json:
        print(json.dumps({**spec.to_dict(), "parameters": parameters}))
    else:
        image = spec.image
        print(
            f"{spec.name}, {spec.nonlinearity}, {image.height}x{image.width}x{image.channels} images, ",
            end="",
        )
        print(f"{len(spec.labels)} classes: {parameters:,} parameters")
    return 0


def train(config: TrainConfig) -> int:
    """Run or resume; see `TrainConfig`."""
    console = make_console(json=config.json)
    checkpoint_path = config.run_dir / "checkpoint.pt"
    if checkpoint_path.exists() and not config.resume:
        raise Refusal(f"{checkpoint_path} exists: add --resume to go on, or name another folder with --out")
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        download=config.download,
        track=track(console, "reading images"),
    )
    spec = _spec(config, dataset.info.image, dataset.info.labels)
    device = _device(config.device)
    torch.manual_seed(config.seed)
    net = build(spec).to(device)
    optimizer = make_optimizer(net, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    state = _resume(checkpoint_path, config, spec, net, optimizer) if config.resume else _begin(config, spec)
    console.print(f"{spec.name}: {count_parameters(net):,} parameters, {config.dataset}, {device}, seed {config.seed}")

    with _stop_after_step() as stopped:
        state = _epochs(config, state, dataset, net, optimizer, device, console, stopped)
    if state.epoch < config.epochs:
        raise KeyboardInterrupt(f"go on with --resume --out {config.run_dir}")
    if state.test_accuracy is None:
        # Read once, after every choice has been made.
        state = replace(state, test_accuracy=evaluate(net, dataset.test, device=device).accuracy)
        save_checkpoint(checkpoint_path, state)
    draw_learning_curve(config.run_dir / "learning_curve.png", state.history, f"{spec.name} on {config.dataset}")
    result = {
        "checkpoint": str(checkpoint_path),
        "parameters": count_parameters(net),
        "test_accuracy": state.test_accuracy,
        "test_images": len(dataset.test),
        "seconds": sum(row["seconds"] for row in state.history),
    }
    console.print(
        f"test accuracy {100 * state.test_accuracy:.2f} % on {len(dataset.test)} images "
        f"after {result['seconds']:.1f} s of training"
    )
    console.print(f"wrote {checkpoint_path}, best.pt, metrics.jsonl and learning_curve.png")
    if config.json:
        print(json.dumps(result))
    return 0


def _epochs(
    config: TrainConfig,
    state: Checkpoint,
    dataset: data.Dataset,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: str,
    console: Console,
    stopped: dict[str, bool],
) -> Checkpoint:
    """Train until the last epoch or until `stopped`, saving after each epoch and at the stop."""
    info = dataset.info
    rest, held = data.hold_out(dataset.train, config.validation, seed=config.seed)
    flip = info.flip if config.flip == "auto" else config.flip == "yes"
    crop = info.crop if config.crop is None else config.crop
    if crop >= min(info.image.height, info.image.width):
        raise Refusal(f"--crop must be smaller than the image, got {crop}")
    batch_size = min(config.batch_size, len(rest))
    num_steps = steps_per_epoch(len(rest), batch_size)
    best = max((row["validation_accuracy"] or 0 for row in state.history), default=-1.0)
    for epoch in range(state.epoch, config.epochs):
        totals = dict(state.totals)
        start = time.monotonic()
        what = f"epoch {epoch + 1}/{config.epochs}"
        with progress(console, what, num_steps, done=state.step) as advance:
            for batch in batches(
                rest,
                batch_size=batch_size,
                epoch=epoch,
                first_step=state.step,
                seed=config.seed,
                flip=flip,
                crop=crop,
                device=device,
            ):
                done = (epoch + batch.step / num_steps) / config.epochs
                lr = learning_rate(config.schedule, config.lr, done)
                loss, correct = train_step(net, optimizer, batch, lr)
                totals["loss"] += loss
                totals["correct"] += correct
                totals["images"] += len(batch.targets)
                advance(note=f"{totals['images'] / (totals['seconds'] + time.monotonic() - start):.0f} images/s")
                if stopped["now"] and batch.step + 1 < num_steps:
                    totals["seconds"] += time.monotonic() - start
                    state = _snapshot(state, net, optimizer, epoch=epoch, step=batch.step + 1, totals=totals)
                    save_checkpoint(config.run_dir / "checkpoint.pt", state)
                    return state
        totals["seconds"] += time.monotonic() - start
        score = evaluate(net, held, device=device) if len(held) else None
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "train_loss": totals["loss"] / totals["images"],
            "train_accuracy": totals["correct"] / totals["images"],
            "validation_loss": score and score.loss,
            "validation_accuracy": score and score.accuracy,
            "lr": lr,
            "images_per_s": totals["images"] / totals["seconds"],
            "seconds": totals["seconds"],
        }
        state = replace(state, history=[*state.history, row])
        state = _snapshot(state, net, optimizer, epoch=epoch + 1, step=0, totals=_no_totals())
        if score is None or score.accuracy > best:
            best = score.accuracy if score else 0.0
            save_checkpoint(config.run_dir / "best.pt", state)
        save_checkpoint(config.run_dir / "checkpoint.pt", state)
        write_metrics(config.run_dir / "metrics.jsonl", state.history)
        console.print(describe_row(row, config.epochs, row["seconds"] * (config.epochs - epoch - 1)))
        if stopped["now"]:
            break
    return state


def _spec(config: TrainConfig, image, labels: tuple[str, ...]) -> Spec:
    return Spec(
        family=config.family,
        depth=config.depth,
        width=config.width,
        nonlinearity=config.nonlinearity,
        image=image,
        labels=labels,
    )


def _begin(config: TrainConfig, spec: Spec) -> Checkpoint:
    return Checkpoint(
        spec=spec,
        model={},
        optimizer={},
        config=_recorded(config),
        epoch=0,
        step=0,
        totals=_no_totals(),
        history=[],
        rng_state=torch.get_rng_state(),
    )


def _resume(
    path: Path, config: TrainConfig, spec: Spec, net: nn.Module, optimizer: torch.optim.Optimizer
) -> Checkpoint:
    """Load a run into `net` and `optimizer`; refuses one that was started with other settings."""
    state = load_checkpoint(path)
    recorded = _recorded(config)
    changed = [
        f"--{key.replace('_', '-')} {state.config.get(key)}"
        for key in recorded
        if key not in FREE_TO_CHANGE and recorded[key] != state.config.get(key)
    ]
    if changed or state.spec != spec:
        raise Refusal(f"{path} was started with {' '.join(changed) or 'another data set'}; resume it with the same")
    try:
        net.load_state_dict(state.model)
        optimizer.load_state_dict(state.optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise Refusal(f"{path} does not fit its own spec: {' '.join(str(error).split())[:200]}") from error
    torch.set_rng_state(state.rng_state)
    return state


def _recorded(config: TrainConfig) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def _snapshot(state: Checkpoint, net: nn.Module, optimizer: torch.optim.Optimizer, **moment: Any) -> Checkpoint:
    return replace(
        state,
        model=net.state_dict(),
        optimizer=optimizer.state_dict(),
        rng_state=torch.get_rng_state(),
        **moment,
    )


def _no_totals() -> dict[str, float]:
    return {"loss": 0.0, "correct": 0, "images": 0, "seconds": 0.0}


def _device(choice: str) -> str:
    if choice == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return "cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def _stop_after_step() -> Iterator[dict[str, bool]]:
    """Ctrl-C and SIGTERM let the step under way finish, so that the checkpoint lies between two steps."""
    stopped = {"now": False}

    def stop(*_: object) -> None:
        stopped["now"] = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
