"""One training run from start or checkpoint to its last file."""

import json
import math
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
from train.cli import given_arguments
from train.config import Settings, TrainConfig
from train.distributed import World, joined
from train.families import count_parameters, outline
from train.files import write_whole
from train.folder import Files, refuse_what_cannot_be_judged
from train.interval import interval, percent
from train.loop import evaluate, steps_per_epoch, to_device
from train.machine import choose_device, choose_precision, forbid_tf32, keep_large_buffers
from train.progress import make_console, progress, track
from train.refusal import Refusal
from train.report import describe_row, draw_learning_curve, write_metrics
from train.spec import Spec
from train.split import FILE, Record
from train.steps import Session, Step, make_augmentation, make_spec, start, take_steps
from train.survey import print_survey

# What may differ between a run and its resumption without changing a single bit of it.
FREE_TO_CHANGE = ("data_dir", "download", "device", "workers", "out", "resume", "json", "describe")
# What a run that recorded no such setting did.
ADDED_LATER = {"delta": "repeated", "start": "pytorch", "sync_batch_norm": False}


def describe(config: Settings) -> int:
    """Print the spec and its number of parameters."""
    if config.classes is None:
        info = data.describe(config.dataset, data_dir=config.data_dir, image_size=config.image_size)
        image, labels = info.image, info.labels
    else:
        image = data.imagenet_image() if config.family.startswith("imagenet") else data.cifar_image()
        labels = tuple(f"class {index}" for index in range(config.classes))
    spec = make_spec(config, image, labels)
    parameters = count_parameters(outline(spec))
    if config.json:
        print(json.dumps({**spec.to_dict(), "parameters": parameters}))
    else:
        form, size = f"{spec.nonlinearity}, {spec.parameterization}", f"{image.height}x{image.width}x{image.channels}"
        print(f"{spec.name}, {form}, {size} images, {len(labels)} classes: {parameters:,} parameters")
    return 0


def train(config: TrainConfig) -> int:
    """Run or resume; see `TrainConfig`. Under torchrun every process calls it, and shares each batch."""
    keep_large_buffers()
    forbid_tf32()
    with joined(choose_device(config.device)) as world:
        return _train(config.resolved(), world, command=_typed(config))


def _train(config: Settings, world: World, *, command: str) -> int:
    console = make_console(json=config.json, quiet=world.rank > 0)
    checkpoint_path = config.run_dir / "checkpoint.pt"
    if checkpoint_path.exists() and not config.resume:
        raise Refusal(f"{checkpoint_path} exists: add --resume to go on, or name another folder with --out")
    if config.batch_size % world.size:
        raise Refusal(f"--batch-size must be a multiple of the {world.size} processes, got {config.batch_size}")
    if config.sync_batch_norm and world.device == "cpu":
        raise Refusal(
            "--sync-batch-norm needs CUDA devices: PyTorch's SyncBatchNorm does not train on a CPU; leave it out"
        )
    config = replace(config, precision=choose_precision(config.precision, world.device))
    earlier = _earlier(checkpoint_path, config) if config.resume else None
    dataset = _load(config, earlier, console)
    if not config.skip_unreadable:
        for part in (dataset.validation, dataset.test):
            if isinstance(part, Files) and len(part):
                refuse_what_cannot_be_judged(part, track(console, "decoding what will be judged"))
    spec, split = make_spec(config, dataset.info.image, dataset.info.labels), data.record(dataset)
    session = start(config, spec, world, console)
    state = _resume(checkpoint_path, earlier, session, spec) if earlier else _begin(config, spec, command, split)
    if split.content and not earlier and world.rank == 0:
        write_whole(config.run_dir / FILE, split.content)
    many = f", {world.size} processes" if world.size > 1 else ""
    console.print(
        f"{spec.name}: {count_parameters(session.net):,} parameters, {config.dataset}, "
        f"{world.device}, {config.precision}, seed {config.seed}{many}"
    )
    with _stop_after_step() as stopped:
        state = _epochs(session, state, dataset, stopped)
    if state.epoch < config.epochs:
        raise KeyboardInterrupt(f"go on with --resume --out {config.run_dir}")
    if world.rank == 0:
        _finish(session, state, dataset)
    return 0


def _load(config: Settings, earlier: Checkpoint | None, console: Console) -> data.Dataset:
    """The data set in its three parts: as the run that goes on divided it, or anew; a folder's is shown."""
    if earlier and "split" in earlier.config:
        return data.load_as_trained(
            earlier.config, data_dir=config.data_dir, beside=config.run_dir, image_size=config.image_size
        )
    if earlier and config.dataset == "folder":
        raise Refusal(
            f"{config.run_dir} does not record which images it trained on, and a new division would test on some of "
            "them: train anew with another --out"
        )
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        download=config.download,
        skip_unreadable=config.skip_unreadable,
        track=track(console, "reading images"),
    )
    dataset = data.divide(dataset, config.validation, seed=config.seed)
    if config.dataset == "folder":
        print_survey(console, dataset)
    return dataset


def _finish(session: Session, state: Checkpoint, dataset: data.Dataset) -> None:
    """The test accuracy, read once, after every choice has been made; then the plot and the summary."""
    config, net, console = session.config, session.net, session.console
    path = config.run_dir / "checkpoint.pt"
    accuracy = state.test_accuracy
    if accuracy is None:
        accuracy = evaluate(net, dataset.test, device=session.world.device, workers=config.workers).accuracy
        save_checkpoint(path, replace(state, test_accuracy=accuracy))
    spec, num_test = state.spec, len(dataset.test)
    draw_learning_curve(config.run_dir / "learning_curve.png", state.history, f"{spec.name} on {config.dataset}")
    result = {
        "checkpoint": str(path),
        "parameters": count_parameters(net),
        "test_accuracy": accuracy,
        "test_images": num_test,
        "seconds": sum(row["seconds"] for row in state.history),
    }
    console.print(
        f"test accuracy {100 * accuracy:.2f} % on {num_test} images after {result['seconds']:.1f} s of training; "
        f"95 % interval {percent(interval(accuracy * num_test, num_test))}"
    )
    console.print(f"wrote {path}, best.pt, metrics.jsonl and learning_curve.png")
    if config.json:
        print(json.dumps(result))


def _epochs(session: Session, state: Checkpoint, dataset: data.Dataset, stopped: dict[str, bool]) -> Checkpoint:
    """Train until the last epoch or until `stopped`, saving after each epoch and at the stop."""
    config, world = session.config, session.world
    rest, held = dataset.train, dataset.validation
    assert held is not None  # `divide` made it
    batch_size = min(config.batch_size, len(rest) // world.size * world.size)
    if batch_size == 0:
        raise Refusal(f"{len(rest)} training images are too few for {world.size} processes")
    rest, held = (to_device(split, world.device) for split in (rest, held))
    augmentation = make_augmentation(config, dataset.info)
    net = world.wrap(session.net, sync_batch_norm=config.sync_batch_norm)
    if config.compile:
        net = torch.compile(net)  # a Module, whatever torch's annotations say
        assert isinstance(net, nn.Module)
    num_steps = steps_per_epoch(len(rest), batch_size)
    for epoch in range(state.epoch, config.epochs):
        steps = take_steps(session, net, rest, augmentation, batch_size=batch_size, epoch=epoch, first=state.step)
        state = _epoch(session, state, steps, num_steps, stopped)
        if state.epoch == epoch:
            return state  # stopped in the middle
        state = _close_epoch(session, state, held, num_picked=batch_size * num_steps)
        if world.any(stopped["now"]):
            break
    return state


def _epoch(
    session: Session, state: Checkpoint, steps: Iterator[Step], num_steps: int, stopped: dict[str, bool]
) -> Checkpoint:
    """Take an epoch's `steps` from `state.step` on; the sums of this epoch are in the totals of what it gives."""
    config, world, epoch = session.config, session.world, state.epoch
    images, sums, lr = 0, torch.zeros(2, dtype=torch.float64, device=world.device), 0.0
    start, next_step = time.monotonic(), state.step
    with progress(session.console, f"epoch {epoch + 1}/{config.epochs}", num_steps, done=state.step) as advance:
        for step in steps:
            images, sums, lr, next_step = images + step.images, sums + step.sums, step.lr, step.number + 1
            advance(note=f"{images * world.size / (time.monotonic() - start):.0f} images/s")
            if world.any(stopped["now"]):
                break
    loss, correct, images = world.sum(torch.cat([sums, sums.new_tensor([images])])).tolist()
    fresh = {"loss": loss, "correct": correct, "images": images, "seconds": time.monotonic() - start}
    totals = {key: state.totals[key] + value for key, value in fresh.items()} | {"lr": lr}
    _refuse_divergence(config, epoch + 1, "loss", totals["loss"])  # in every process alike: the sum is over all
    if next_step == num_steps:
        return session.snapshot(state, epoch=epoch + 1, step=0, totals=totals)
    state = session.snapshot(state, epoch=epoch, step=next_step, totals=totals)
    session.save("checkpoint.pt", state)
    return state


def _close_epoch(session: Session, state: Checkpoint, held: data.Part, *, num_picked: int) -> Checkpoint:
    """Validate, add a row to the history, save; `state.totals` holds the sums of `num_picked` images."""
    config, world, totals = session.config, session.world, state.totals
    if lost := round(num_picked - totals["images"]):
        session.console.print(f"epoch {state.epoch}: {lost} of {num_picked} images could not be read")
    if not totals["images"]:
        raise Refusal(f"none of the {num_picked} training images of epoch {state.epoch} could be read: mend them")
    best = max((row["validation_accuracy"] or 0 for row in state.history), default=-1.0)
    score = None
    if len(held) and world.rank == 0:
        score = evaluate(session.net, held, device=world.device, workers=config.workers)
    validation_loss = world.sum(torch.tensor(score.loss if score else 0.0, device=world.device)).item()
    _refuse_divergence(config, state.epoch, "validation loss", validation_loss)
    row: dict[str, Any] = {
        "epoch": state.epoch,
        "train_loss": totals["loss"] / totals["images"],
        "train_accuracy": totals["correct"] / totals["images"],
        "validation_loss": score and score.loss,
        "validation_accuracy": score and score.accuracy,
        "lr": totals["lr"],
        "images_per_s": totals["images"] / totals["seconds"],
        "seconds": totals["seconds"],
    }
    state = replace(state, history=[*state.history, row], totals=_no_totals())
    if score is None or score.accuracy > best:
        session.save("best.pt", state)
    session.save("checkpoint.pt", state)
    if world.rank == 0:
        write_metrics(config.run_dir / "metrics.jsonl", state.history)
    session.console.print(describe_row(row, config.epochs, row["seconds"] * (config.epochs - state.epoch)))
    return state


def _refuse_divergence(config: Settings, epoch: int, what: str, loss: float) -> None:
    """Before anything of this epoch is saved: the files stay those of the last good one."""
    if not math.isfinite(loss):
        raise Refusal(
            f"training diverged, the {what} of epoch {epoch} is {loss}: lower --lr {config.lr:g}; "
            f"{config.run_dir} keeps the files of the epoch before, if there was one"
        )


def _begin(config: Settings, spec: Spec, command: str, split: Record) -> Checkpoint:
    record = {**_recorded(config), "command": command, "split": split.to_dict()}
    return Checkpoint.fresh(spec, {}, record, totals=_no_totals())


def _earlier(path: Path, config: Settings) -> Checkpoint:
    """The run to go on with; refuses one that was started with other settings."""
    state = load_checkpoint(path)
    recorded = _recorded(config)
    changed = [
        f"--{key.replace('_', '-')} {state.config.get(key, ADDED_LATER.get(key))}"
        for key in recorded
        if key not in FREE_TO_CHANGE and recorded[key] != state.config.get(key, ADDED_LATER.get(key))
    ]
    if changed:
        raise Refusal(f"{path} was started with {' '.join(changed)}; resume it with the same")
    return state


def _resume(path: Path, state: Checkpoint, session: Session, spec: Spec) -> Checkpoint:
    """Load a run into the session's net and optimizer; refuses one that learns another data set."""
    if state.spec != spec:
        raise Refusal(f"{path} was started with another data set; resume it with the same")
    try:
        session.net.load_state_dict(state.model)
        session.optimizer.load_state_dict(state.optimizer)
        session.scaler.load_state_dict(state.scaler)
    except (RuntimeError, ValueError, KeyError) as error:
        raise Refusal(f"{path} does not fit its own spec: {' '.join(str(error).split())[:200]}") from error
    torch.set_rng_state(state.rng_state)
    return state


def _recorded(config: Settings) -> dict[str, Any]:
    """Paths as text; the data set's whole, so that later commands find it from any folder."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return values | {"data_dir": str(config.data_dir.resolve()) if config.data_dir else None}


def _typed(config: TrainConfig) -> str:
    """The command without the places of this machine: it travels with the model."""
    data_dir = Path(config.data_dir.resolve().name) if config.data_dir else None
    out = Path(config.out.name) if config.out and config.out.is_absolute() else config.out
    return f"python train/run.py {given_arguments(replace(config, data_dir=data_dir, out=out))}".strip()


def _no_totals() -> dict[str, float]:
    return {"loss": 0.0, "correct": 0, "images": 0, "seconds": 0.0}


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
