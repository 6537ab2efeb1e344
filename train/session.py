"""One training run from start or checkpoint to its last file."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from common.files import write_whole
from common.interval import interval, percent
from common.progress import make_console, progress, track
from common.refusal import Refusal
from common.spec import ImageSpec
from train.begin import command_to_resume, continued, fresh_record, like, resume, typed
from train.checkpoint import Checkpoint, load_checkpoint, load_net, save_checkpoint
from train.config import Settings, TrainConfig
from train.data import datasets
from train.data.folder import Files, refuse_what_cannot_be_judged
from train.data.split import FILE
from train.data.survey import print_survey
from train.distributed import World, joined
from train.families import count_parameters, outline
from train.fine_tune.fake_quantize import FakeQuantized
from train.fine_tune.from_plain import load_source, open_plain
from train.fine_tune.plain_file import PlainFile
from train.loop import answers, evaluate, steps_per_epoch, to_device
from train.machine import choose_device, choose_precision, forbid_tf32, keep_large_buffers
from train.memory import available_bytes, refuse_what_does_not_fit
from train.report import Log, describe_fit, describe_row, draw_learning_curve, event_files, write_metrics
from train.steps import Session, Step, make_augmentation, make_spec, start, take_steps
from train.temperature import Fit, fit_temperature

FILES = ("checkpoint.pt", "best.pt")  # where the run stands; its best epoch by validation, or its last without


def describe(given: TrainConfig) -> int:
    """Print the spec and its number of parameters."""
    source = load_source(given.init) if given.init else None
    config = (like(given, source) if source else given).resolved()
    if config.classes is None:
        image = source and source.spec.image
        info = datasets.describe(config.dataset, data_dir=config.data_dir, image_size=config.image_size, image=image)
        image, labels = info.image, info.labels
    else:
        image = datasets.imagenet_image() if config.family.startswith("imagenet") else datasets.cifar_image()
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
    path, command = config.run_dir / "checkpoint.pt", typed(config)
    if path.exists() and not config.resume:
        raise Refusal(f"{path} exists: add --resume to go on, or name another folder with --out")
    earlier, source = load_checkpoint(path) if config.resume else None, None
    if earlier:
        config = continued(config, earlier)
    elif config.init:
        config = like(config, source := load_source(config.init))
    with joined(choose_device(config.device)) as world:
        return _train(config, world, earlier, source, command)


def _train(
    config: TrainConfig, world: World, earlier: Checkpoint | None, source: Checkpoint | PlainFile | None, command: str
) -> int:
    console = make_console(json=config.json, quiet=world.rank > 0)
    if config.sync_batch_norm and world.device == "cpu":
        raise Refusal(
            "--sync-batch-norm needs CUDA devices: PyTorch's SyncBatchNorm does not train on a CPU; leave it out"
        )
    known = earlier or source
    dataset = _load(config, earlier, known and known.spec.image, console)
    settings = config if isinstance(config, Settings) else config.resolved(len(dataset.train))
    precision = "fp32" if settings.qat else choose_precision(settings.precision, world.device)
    settings = replace(settings, precision=precision)
    if settings.batch_size % world.size:
        raise Refusal(f"--batch-size must be a multiple of the {world.size} processes, got {settings.batch_size}")
    spec, split = make_spec(settings, dataset.info.image, dataset.info.labels), datasets.record(dataset)
    if earlier and replace(earlier.spec, temperature=1.0) != spec:
        raise Refusal(f"{settings.run_dir} was started with another data set; resume it with the same")
    available = available_bytes(world.device)
    size = refuse_what_does_not_fit(settings, spec, world, available=available)
    if not settings.skip_unreadable:
        for part in (dataset.validation, dataset.test):
            if isinstance(part, Files) and len(part):
                refuse_what_cannot_be_judged(part, track(console, "decoding what will be judged"))
    if isinstance(source, PlainFile):
        source = open_plain(source, settings, dataset, world, console)
    session = start(settings, spec, world, console, source)
    if earlier:
        resume(earlier, session)
        state = replace(earlier, config=earlier.config | {"epochs": settings.epochs})
        if earlier.test_accuracy is not None and state.epoch < settings.epochs:
            console.print(f"the test images were read after epoch {state.epoch}: what is chosen from now on knows them")
    else:
        record = fresh_record(settings, command, split, source)
        state = Checkpoint.fresh(spec, {}, record, totals=_no_totals())
        if split.content and world.rank == 0:
            write_whole(settings.run_dir / FILE, split.content)
    many = f", {world.size} processes" if world.size > 1 else ""
    console.print(
        f"{spec.name}: {count_parameters(session.net):,} parameters, {settings.dataset}, "
        f"{world.device}, {settings.precision}, seed {settings.seed}{many}; {size}"
    )
    events = event_files(settings.run_dir, state.epoch) if settings.tensorboard and world.rank == 0 else nullcontext()
    with _stop_after_step() as stopped, events as log:
        state = _epochs(session, state, dataset, stopped, log)
    if world.rank == 0:
        _finish(session, state, dataset)
    return 0


def _load(
    config: TrainConfig, earlier: Checkpoint | None, image: ImageSpec | None, console: Console
) -> datasets.Dataset:
    """The data set in its three parts: as the run that goes on divided it, or anew; a folder's is shown."""
    if earlier and "split" in earlier.config:
        return datasets.load_as_trained(earlier.config, data_dir=config.data_dir, beside=config.run_dir, image=image)
    if earlier and config.learnt == "folder":
        raise Refusal(
            f"{config.run_dir} does not record which images it trained on, and a new division would test on some of "
            "them: train anew with another --out"
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
    settings = config if isinstance(config, Settings) else config.resolved()
    dataset = datasets.divide(dataset, settings.validation, seed=config.seed)
    if config.learnt == "folder":
        print_survey(console, dataset)
    return dataset


def _finish(session: Session, state: Checkpoint, dataset: datasets.Dataset) -> None:
    """What is known of the nets at the end, after every choice has been made; then the plot and the summary."""
    config, console = session.config, session.console
    chosen = _complete(session, dataset)
    accuracy, row, num_test = chosen.test_accuracy or 0.0, chosen.history[-1], len(dataset.test)
    title = f"{state.spec.name} on {config.dataset}"
    draw_learning_curve(config.run_dir / "learning_curve.png", state.history, title, smoothing=config.label_smoothing)
    result = {
        "checkpoint": str(config.run_dir / "best.pt"),
        "epoch": row["epoch"],
        "parameters": count_parameters(session.net),
        "test_accuracy": accuracy,
        "test_images": num_test,
        "calibration": chosen.calibration,
        "seconds": sum(row["seconds"] for row in state.history),
    }
    console.print(
        f"test accuracy {100 * accuracy:.2f} % on {num_test} images after {result['seconds']:.1f} s of training; "
        f"95 % interval {percent(interval(accuracy * num_test, num_test))}"
    )
    if row["validation_accuracy"] is not None and (num_held := len(dataset.validation or ())):
        console.print(f"it is that of best.pt, epoch {row['epoch']}, chosen by validation")
        picked = np.linspace(0, len(dataset.train) - 1, min(len(dataset.train), max(200, num_held), 1000)).astype(int)
        net = load_net(chosen).to(session.world.device)
        known = evaluate(net, dataset.train.take(picked), device=session.world.device, workers=config.workers).accuracy
        console.print(describe_fit(known, len(picked), row["validation_accuracy"], num_held))
    console.print(str(Fit(**chosen.calibration)))
    console.print(f"wrote {', '.join(FILES)}, metrics.jsonl and learning_curve.png to {config.run_dir}")
    if config.json:
        print(json.dumps(result))


def _complete(session: Session, dataset: datasets.Dataset) -> Checkpoint:
    """Add test accuracy and temperature to the run's files where they lack them; gives the one to fold."""
    known: dict[int, Checkpoint] = {}
    paths = [path for name in FILES if (path := session.config.run_dir / name).exists()]
    for path, state in [(path, load_checkpoint(path)) for path in paths]:
        if state.test_accuracy is not None and state.calibration:
            continue
        if state.epoch not in known:  # both files often hold one net
            known[state.epoch] = _completed(session, state, dataset)
        of_net = known[state.epoch]
        state = replace(state, spec=of_net.spec, calibration=of_net.calibration, test_accuracy=of_net.test_accuracy)
        save_checkpoint(path, state)
    return load_checkpoint(paths[-1])


def _completed(session: Session, state: Checkpoint, dataset: datasets.Dataset) -> Checkpoint:
    """The test images are read once for a net; the temperature is fitted on the images held out, its choice's too."""
    device, workers = session.world.device, session.config.workers
    net = load_net(state).to(device)
    accuracy = state.test_accuracy
    if accuracy is None:
        accuracy = evaluate(net, dataset.test, device=device, workers=workers).accuracy
    held = dataset.validation
    assert held is not None  # `divide` made it
    fit = fit_temperature(*answers(net, held, device=device, workers=workers))
    spec = replace(state.spec, temperature=fit.temperature)
    return replace(state, test_accuracy=accuracy, spec=spec, calibration=fit.to_dict())


def _epochs(
    session: Session, state: Checkpoint, dataset: datasets.Dataset, stopped: dict[str, bool], log: Log | None
) -> Checkpoint:
    """Train until the last epoch, or as long as validation asks for; saves after each epoch, and where it stops."""
    config, world = session.config, session.world
    rest, held = dataset.train, dataset.validation
    assert held is not None  # `divide` made it
    if config.patience and not len(held):
        raise Refusal("--patience waits for the validation accuracy, and no image is held out: raise --validation")
    batch_size = min(config.batch_size, len(rest) // world.size * world.size)
    if batch_size == 0:
        raise Refusal(f"{len(rest)} training images are too few for {world.size} processes")
    rest, held = (to_device(split, world.device) for split in (rest, held))
    augmentation = make_augmentation(config, dataset.info)
    num_steps, net = steps_per_epoch(len(rest), batch_size), None
    for epoch in range(state.epoch, config.epochs):
        if world.any(bool(config.patience) and _since_best(state.history) >= config.patience):
            session.console.print(f"no better validation accuracy for {config.patience} epochs: training ends here")
            break
        if world.any(stopped["now"]):
            break
        if net is None or epoch == config.freeze:
            net = _wrapped(session, is_frozen=epoch < config.freeze)
        steps = take_steps(session, net, rest, augmentation, batch_size=batch_size, epoch=epoch, first=state.step)
        state = _epoch(session, state, steps, num_steps, stopped)
        if state.epoch == epoch:
            break
        state = _close_epoch(session, state, held, num_picked=batch_size * num_steps)
        if log:
            log(state.history[-1])
    else:
        return state
    if world.any(stopped["now"]):
        raise KeyboardInterrupt(f"go on with: {command_to_resume(config, world.size)}")
    return state


def _wrapped(session: Session, *, is_frozen: bool) -> nn.Module:
    """The session's net as it is trained: all of it, or its last layer alone."""
    session.net.requires_grad_(not is_frozen)
    session.net.get_submodule("fc").requires_grad_(True)
    net = FakeQuantized(session.net) if session.config.qat else session.net
    net = session.world.wrap(net, sync_batch_norm=session.config.sync_batch_norm)
    if session.config.compile:
        net = torch.compile(net)  # a Module, whatever torch's annotations say
        assert isinstance(net, nn.Module)
    return net


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    """Of an epoch, by what was held out: accuracy, and the loss where two are equal."""
    return row["validation_accuracy"], -row["validation_loss"]


def _since_best(history: list[dict[str, Any]]) -> int:
    """Epochs since the best one; 0 where nothing was held out: the last is the best then."""
    if not history or history[-1]["validation_accuracy"] is None:
        return 0
    ranks = [_rank(row) for row in history]
    return len(ranks) - 1 - ranks.index(max(ranks))


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


def _close_epoch(session: Session, state: Checkpoint, held: datasets.Part, *, num_picked: int) -> Checkpoint:
    """Validate, add a row to the history, save; `state.totals` holds the sums of `num_picked` images."""
    config, world, totals = session.config, session.world, state.totals
    if lost := round(num_picked - totals["images"]):
        session.console.print(f"epoch {state.epoch}: {lost} of {num_picked} images could not be read")
    if not totals["images"]:
        raise Refusal(f"none of the {num_picked} training images of epoch {state.epoch} could be read: mend them")
    score = None
    if len(held) and world.rank == 0:
        score = evaluate(session.judged, held, device=world.device, workers=config.workers)
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
    if not _since_best(state.history):
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
