"""How a run begins: anew, with the layers of another net, or where it stopped."""

import os
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from common.cli import given_arguments
from common.refusal import Refusal
from train.checkpoint import Checkpoint
from train.config import Settings, TrainConfig
from train.data.split import Record
from train.fine_tune.plain_file import PlainFile
from train.steps import Session

# What may differ between a run and its resumption without changing a bit of the epochs that both have.
FREE_TO_CHANGE = (
    *("data_dir", "download", "device", "workers", "out", "resume", "json", "describe"),
    *("epochs", "patience", "tensorboard"),
)
PATHS = ("data_dir", "init", "out")


def continued(config: TrainConfig, state: Checkpoint) -> Settings:
    """The settings of the run in `state`; refuses others that `config` gives."""
    if "epochs" not in state.config:
        raise Refusal(f"{config.run_dir} holds an imported net, which no run of ours trained: name it with --init")
    names = {field.name for field in fields(Settings)}
    was: dict[str, Any] = {name: value for name, value in state.config.items() if name in names}
    given = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    now = recorded(config)
    changed = [name for name in sorted(given - {*FREE_TO_CHANGE}) if now[name] != was.get(name)]
    if changed:
        flags = " ".join(f"--{name.replace('_', '-')} {was.get(name)}" for name in changed)
        raise Refusal(f"{config.run_dir} was started with {flags}; resume it with the same, or leave that out")
    paths = {name: Path(was[name]) for name in PATHS if was.get(name)}
    taken: dict[str, Any] = {
        name: getattr(config, name) for name in (given | {"json", "out", "resume"}) & {*FREE_TO_CHANGE}
    }
    together: dict[str, Any] = {**was, **paths, **taken, "out": config.run_dir}
    settings = Settings(**together)
    if settings.epochs < was["epochs"]:
        raise Refusal(f"--epochs may grow: {config.run_dir} was started with {was['epochs']}, got {settings.epochs}")
    return settings


def like(config: TrainConfig, source: Checkpoint | PlainFile) -> TrainConfig:
    """`config` for the net of `source`; refuses another that was given."""
    spec, defaults = source.spec, TrainConfig()
    of_source = {
        name: getattr(spec, name) for name in ("family", "depth", "width", "nonlinearity", "parameterization", "delta")
    } | {"image_size": spec.image.height}
    for name, value in of_source.items():
        if getattr(config, name) not in (value, getattr(defaults, name)):
            raise Refusal(
                f"--init brings its net along, with --{name.replace('_', '-')} {value}: "
                f"leave out --{name.replace('_', '-')} {getattr(config, name)}"
            )
    return replace(config, **of_source)


def recorded(config: TrainConfig) -> dict[str, Any]:
    """Paths as text; the data set's whole, so that later commands find it from any folder."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return values | {"data_dir": str(config.data_dir.resolve()) if config.data_dir else None}


def fresh_record(config: Settings, command: str, split: Record, source: Checkpoint | None) -> dict[str, Any]:
    """What a new run says of itself; `source` is the net that it fine-tunes."""
    record = {**recorded(config), "command": command, "split": split.to_dict()}
    if source is None:
        return record
    opened = {"unfold": source.config["unfold"]} if "unfold" in source.config else {}
    return record | {"init_sha256": source.sha256} | opened


def typed(config: TrainConfig) -> str:
    """The command without the places of this machine: it travels with the model."""
    places = {name: getattr(config, name) for name in PATHS if getattr(config, name)}
    short = {name: Path(path.resolve().name) for name, path in places.items() if name != "out" or path.is_absolute()}
    return f"python train/run.py {given_arguments(replace(config, **short))}".strip()


def command_to_resume(config: Settings, num_processes: int) -> str:
    """What goes on with a run when it is pasted into the shell that started it."""
    script = Path(__file__).with_name("run.py")
    script = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    several = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        if num_processes > 1
        else []
    )
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    return shlex.join([python, *several, str(script), "--resume", "--out", str(config.run_dir)])


def resume(state: Checkpoint, session: Session) -> None:
    """Load a run into the session's nets, optimizer and random numbers."""
    try:
        session.net.load_state_dict(state.model)
        if session.judged is not session.net:
            session.judged.load_state_dict(state.average)
        session.optimizer.load_state_dict(state.optimizer)
        session.scaler.load_state_dict(state.scaler)
    except (RuntimeError, ValueError, KeyError) as error:
        raise Refusal(
            f"{session.config.run_dir} does not fit its own spec: {' '.join(str(error).split())[:200]}"
        ) from error
    torch.set_rng_state(state.rng_state)
