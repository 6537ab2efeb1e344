"""A training from its command line to its last file: set up, trained epoch by epoch, judged at the end."""

import json
import math
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from common.files import write_whole
from common.interval import interval, percent
from common.progress import make_console, track
from common.refusal import Refusal
from common.spec import ImageSpec
from train import machine
from train.checkpoint import Checkpoint, PlainFile, load_checkpoint, load_net, save_checkpoint
from train.config import Settings, TrainConfig, command_to_resume, continued, like, recorded, typed
from train.data import datasets
from train.data.folder import FILE, Files, take_decodable
from train.families import count_parameters, outline
from train.fine_tune.from_plain import load_source
from train.machine import World
from train.report import describe_fit, describe_row, draw_learning_curve, event_files, print_survey
from train.temperature import Fit, fit_temperature
from train.trainer import Trainer, answers, evaluate

DECODING = "decoding validation and test images"
FILES = ("checkpoint.pt", "best.pt")  # where the run stands; its best epoch by validation, or its last without


def describe(given: TrainConfig) -> int:
    """Print the spec and its number of parameters."""
    source = load_source(given.init) if given.init else None
    config = (like(given, source) if source else given).resolved()
    if config.classes is None:
        image = source and source.spec.image
        info = datasets.info_of(config.dataset, data_dir=config.data_dir, image_size=config.image_size, image=image)
        image, labels = info.image, info.labels
    else:
        image = datasets.imagenet_image() if config.family.startswith("imagenet") else datasets.cifar_image()
        labels = tuple(f"class {index}" for index in range(config.classes))
    spec = config.spec(image, labels)
    parameters = count_parameters(outline(spec))
    if config.json:
        print(json.dumps({**spec.to_dict(), "parameters": parameters}))
    else:
        kind, size = f"{spec.nonlinearity}, {spec.parameterization}", f"{image.height}x{image.width}x{image.channels}"
        print(f"{spec.name}, {kind}, {size} images, {len(labels)} classes: {parameters:,} parameters")
    return 0


def train(config: TrainConfig) -> int:
    """Run or resume; see `TrainConfig`. Under torchrun every process calls it, and shares each batch."""
    machine.keep_large_buffers()
    machine.forbid_tf32()
    path, command = config.run_dir / "checkpoint.pt", typed(config)
    if path.exists() and not config.resume:
        raise Refusal(f"{path} exists: add --resume to go on, or name another folder with --out")
    _refuse_unwritable(config.run_dir)
    earlier, source = load_checkpoint(path) if config.resume else None, None
    if earlier:
        config = continued(config, earlier)
    elif config.init:
        config = like(config, source := load_source(config.init))
    with machine.joined(machine.choose_device(config.device)) as world:
        trainer = set_up(config, world, earlier, source, command)
        _train_epochs(trainer)
        if world.rank == 0:
            _finish(trainer)
    return 0


def _refuse_unwritable(run_dir: Path) -> None:
    """Before the first epoch rather than after it; makes nothing."""
    place = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise Refusal(f"cannot write to {run_dir}: {error.strerror}; name another folder with --out") from error


def set_up(
    config: TrainConfig, world: World, earlier: Checkpoint | None, source: Checkpoint | PlainFile | None, command: str
) -> Trainer:
    """The run before its next step: a new one, one that fine-tunes `source`, or `earlier` resumed."""
    console = make_console(json=config.json, quiet=world.rank > 0)
    if config.sync_batch_norm and world.device == "cpu":
        raise Refusal("--sync-batch-norm needs CUDA devices: SyncBatchNorm does not train on a CPU; leave it out")
    known = earlier or source
    dataset = _load(config, earlier, known and known.spec.image, console)
    settings = config if isinstance(config, Settings) else config.resolved(len(dataset.train))
    precision = "fp32" if settings.qat else machine.choose_precision(settings.precision, world.device)
    settings = replace(settings, precision=precision)
    if settings.batch_size % world.size:
        raise Refusal(f"--batch-size must be a multiple of the {world.size} processes, got {settings.batch_size}")
    spec = settings.spec(dataset.info.image, dataset.info.labels)
    split, content = datasets.record(dataset)
    if earlier and replace(earlier.spec, temperature=1.0) != spec:
        raise Refusal(f"{settings.run_dir} was started with another data set; resume it with the same")
    memory = machine.refuse_what_does_not_fit(settings, spec, world, available=machine.available_bytes(world.device))
    if not settings.skip_unreadable:
        for part in (dataset.validation, dataset.test):
            if isinstance(part, Files) and len(part):
                take_decodable(part, track(console, DECODING))
    trainer = Trainer(settings, spec, dataset, world, console)
    if earlier:
        trainer.resume(earlier)
    else:
        trainer.record = {**recorded(settings), "command": command, "split": split}
        if source:
            trainer.fine_tune(source)
        if content and world.rank == 0:
            write_whole(settings.run_dir / FILE, content)
    many = f", {world.size} processes" if world.size > 1 else ""
    run = f"{settings.dataset}, {world.device}, {settings.precision}, seed {settings.seed}{many}"
    console.print(f"{spec.name}: {count_parameters(trainer.net):,} parameters, {run}; {memory}")
    return trainer


def _load(
    config: TrainConfig, earlier: Checkpoint | None, image: ImageSpec | None, console: Console
) -> datasets.Dataset:
    """The data set in its three parts: divided as the run to resume recorded it, or newly; a folder's is printed."""
    if earlier and "split" in earlier.config:
        return datasets.load_as_trained(earlier.config, data_dir=config.data_dir, beside=config.run_dir, image=image)
    if earlier and config.learnt == "folder":
        raise Refusal(
            f"{config.run_dir} does not record which images it trained on, and a new division would test on some of "
            "them: train again with another --out"
        )
    dataset = datasets.load(
        config.learnt,
        data_dir=config.data_dir,
        image_size=config.image_size,
        image=image,
        download=config.download,
        skip_unreadable=config.skip_unreadable,
        track=track(console, "reading images"),
    )
    dataset = datasets.divide(dataset, config.resolved().validation, seed=config.seed, track=track(console, DECODING))
    if config.learnt == "folder":
        print_survey(console, dataset)
    return dataset


def _train_epochs(trainer: Trainer) -> None:
    """Train until the last epoch, or as long as validation asks for; saves after each epoch."""
    settings, world, console = trainer.settings, trainer.world, trainer.console
    logged = settings.tensorboard and world.rank == 0
    events = event_files(settings.run_dir, trainer.epochs_done) if logged else nullcontext()
    with _stopped_by_signals(trainer), events as log:
        while trainer.epochs_done < settings.epochs:
            if settings.patience and trainer.since_best() >= settings.patience:
                console.print(f"no better validation accuracy for {settings.patience} epochs: training ends here")
                break
            row = None if world.any(trainer.is_stopped) else trainer.epoch()
            _refuse_divergence(trainer, row)
            if row is None:
                if trainer.steps_done:
                    trainer.save("checkpoint.pt")
                raise KeyboardInterrupt(f"go on with: {command_to_resume(settings, world.size)}")
            if not trainer.since_best():
                trainer.save("best.pt")
            trainer.save("checkpoint.pt")
            if world.rank == 0:
                lines = "".join(json.dumps(row) + "\n" for row in trainer.history)
                write_whole(settings.run_dir / "metrics.jsonl", lines.encode())
            left_s = row["seconds"] * (settings.epochs - trainer.epochs_done)
            console.print(describe_row(row, settings.epochs, left_s))
            if log:
                log(row)


def _refuse_divergence(trainer: Trainer, row: dict[str, Any] | None) -> None:
    """Before anything of this epoch is saved: the files stay those of the last good one."""
    settings, number = trainer.settings, row["epoch"] if row else trainer.epochs_done + 1
    losses = {"loss": row["train_loss"], "validation loss": row["validation_loss"]} if row else trainer.totals
    for what in ("loss", "validation loss"):
        if not math.isfinite(loss := losses.get(what) or 0.0):
            raise Refusal(
                f"training diverged, the {what} of epoch {number} is {loss}: lower --lr {settings.lr:g}; "
                f"{settings.run_dir} keeps the files of the epoch before, if there was one"
            )


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM let the step under way finish, so that the checkpoint lies between two steps."""

    def stop(*_: object) -> None:
        trainer.is_stopped = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(trainer: Trainer) -> None:
    """Judge the nets after every choice has been made; then the plot and the summary."""
    settings, dataset, console = trainer.settings, trainer.dataset, trainer.console
    device, workers = trainer.world.device, settings.workers
    chosen = _complete(settings, dataset, device)
    accuracy, row, num_test = chosen.test_accuracy or 0.0, chosen.history[-1], len(dataset.test)
    title, curve = f"{chosen.spec.name} on {settings.dataset}", settings.run_dir / "learning_curve.png"
    draw_learning_curve(curve, trainer.history, title, smoothing=settings.label_smoothing)
    result = {
        "checkpoint": str(settings.run_dir / "best.pt"),
        "epoch": row["epoch"],
        "parameters": count_parameters(trainer.net),
        "test_accuracy": accuracy,
        "test_images": num_test,
        "calibration": chosen.calibration,
        "seconds": sum(row["seconds"] for row in trainer.history),
    }
    console.print(
        f"test accuracy {100 * accuracy:.2f} % on {num_test} images after {result['seconds']:.1f} s of training; "
        f"95 % interval {percent(interval(accuracy * num_test, num_test))}"
    )
    if row["validation_accuracy"] is not None and (num_held := len(dataset.validation or ())):
        console.print(f"this is the accuracy of best.pt, epoch {row['epoch']}, chosen by validation")
        num = min(len(dataset.train), max(200, num_held), 1000)
        some = dataset.train.take(np.linspace(0, len(dataset.train) - 1, num).astype(int))
        known = evaluate(load_net(chosen).to(device), some, device=device, workers=workers).accuracy
        console.print(describe_fit(known, num, row["validation_accuracy"], num_held))
    console.print(str(Fit(**chosen.calibration)))
    console.print(f"wrote {', '.join(FILES)}, metrics.jsonl and learning_curve.png to {settings.run_dir}")
    if settings.json:
        print(json.dumps(result))


def _complete(settings: Settings, dataset: datasets.Dataset, device: str) -> Checkpoint:
    """Add test accuracy and temperature to the run's files where they lack them; gives the one to fold.

    The test images are read once for a net. The temperature is fitted on the images held out, its choice's too.
    """
    known: dict[int, dict[str, Any]] = {}  # by epoch: both files often hold one net
    paths = [path for name in FILES if (path := settings.run_dir / name).exists()]
    on: dict[str, Any] = {"device": device, "workers": settings.workers}
    assert dataset.validation is not None  # `divide` made it
    for path in paths:
        state = load_checkpoint(path)
        if state.test_accuracy is not None and state.calibration:
            continue
        if state.epoch not in known:
            net, accuracy = load_net(state).to(device), state.test_accuracy
            if accuracy is None:
                accuracy = evaluate(net, dataset.test, **on).accuracy
            fit = fit_temperature(*answers(net, dataset.validation, **on))
            spec = replace(state.spec, temperature=fit.temperature)
            known[state.epoch] = {"test_accuracy": accuracy, "spec": spec, "calibration": fit.to_dict()}
        save_checkpoint(path, replace(state, **known[state.epoch]))
    return load_checkpoint(paths[-1])
