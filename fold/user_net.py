"""A net that this project has not built: made by a function in its user's file, or by a name of timm's."""

import contextlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from common.refusal import Refusal

SEED = 0  # of the numbers that a net starts from, where no weights are given


@dataclass(frozen=True)
class Made:
    """A net, what it is called, and what timm says of its images."""

    net: nn.Module
    name: str
    record: dict[str, Any]  # where it comes from
    image_size: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None
    labels: tuple[str, ...] = ()


def from_file(where: str) -> Made:
    """The net that `FILE.py:FUNCTION` returns; without a name the function is `make`. It takes no arguments.

    The file is imported, its own folder first on Python's path. Refuses, with the line, what it raises.
    """
    file, colon, function = where.partition(".py")
    path, function = Path(file + ".py"), function.removeprefix(":") or "make"
    if not colon or not path.is_file():
        raise Refusal(f"{where} is neither a checkpoint (.pt) nor FILE.py:FUNCTION of a file that exists")
    torch.random.manual_seed(SEED)  # pyright: ignore[reportUnknownMemberType]
    # What the file prints must not stand in a result on stdout.
    with _folder_first(path), contextlib.redirect_stdout(sys.stderr):
        net = _call(path, _import(path), function)
    if not isinstance(net, nn.Module):
        what = (
            f"the class {net.__name__}: call it"
            if isinstance(net, type)
            else f"an object of the type {type(net).__name__}"
        )
        raise Refusal(f"{path}: {function} returns {what}; it must return a torch.nn.Module")
    name = type(net).__name__
    return Made(net, path.stem if name == "Sequential" else name, {"made_by": f"{path.name}:{function}"})


def from_timm(name: str, *, num_classes: int | None) -> Made:
    """timm's net of that name, read as timm says; without its published weights, which would be downloaded."""
    try:
        timm, timm_data = (importlib.import_module(module) for module in ("timm", "timm.data"))
    except ImportError as error:
        raise Refusal(f"--timm needs timm, which does not load ({error}): pip install timm") from error
    if not timm.is_model(name):
        close = ", ".join(get_close_matches(name, map(str, timm.list_models()), 3))
        raise Refusal(f"timm has no net {name}" + (f"; close are {close}" if close else "; see timm.list_models()"))
    torch.random.manual_seed(SEED)  # pyright: ignore[reportUnknownMemberType]
    net = timm.create_model(name, pretrained=False, **({"num_classes": num_classes} if num_classes else {}))
    said: dict[str, Any] = timm_data.resolve_data_config({}, pretrained_cfg=net.pretrained_cfg)
    subset = None if num_classes else timm_data.infer_imagenet_subset(net)
    labels = tuple(timm_data.ImageNetInfo(subset).label_descriptions()) if subset else ()
    _, height, width = said["input_size"]
    # timm's other modes stretch, or add a border, which is not known here.
    resize = int(height / said["crop_pct"]) if said["crop_mode"] == "center" and height == width else None
    mean, std = (tuple(map(float, said[key])) for key in ("mean", "std"))
    record = {"made_by": f"timm {timm.__version__}: {name}"}
    return Made(net, name, record, (height, width), mean, std, resize, labels)


def _import(path: Path) -> ModuleType:
    """The module of a file, under a name that no other module has."""
    name = f"the_users.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _watched(path) as opened:
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            reason = None if opened else error
        else:
            reason = None
    if opened:
        file, line = opened[0]
        raise Refusal(
            f"{path}, line {line}, reads {file} when it is imported: let it define nets only, "
            "and give their weights with --weights"
        )
    if reason:
        raise Refusal(f"{path}{_line(path, reason)}: the file cannot be imported: {_shown(reason)}") from reason
    return module


def _call(path: Path, module: ModuleType, function: str) -> Any:
    make = getattr(module, function, None)
    if not callable(make):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        has = f"it defines {', '.join(own[:5])}" if own else "it defines nothing"
        raise Refusal(f"{path} has no function {function}; {has}: name the one that returns the net, {path}:NAME")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise Refusal(
            f"{path}: {function} is called without arguments, and has {error}; write one that has none"
        ) from error
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise Refusal(f"{path}{_line(path, error)}: {function} raises {_shown(error)}") from error


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _line(path: Path, error: BaseException) -> str:
    """Where in the file an exception comes from, as far as it can be told."""
    if isinstance(error, SyntaxError) and error.filename == str(path.absolute()):
        return f", line {error.lineno}"
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.absolute())
    ]
    return f", line {lines[-1]}" if lines else ""


@contextlib.contextmanager
def _folder_first(path: Path) -> Generator[None]:
    """The file's own folder on Python's path, as if the file were run."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextlib.contextmanager
def _watched(path: Path) -> Generator[list[tuple[str, int]]]:
    """The files, with their lines, that the code of `path` itself opens; not those that an import of its opens."""
    opened: list[tuple[str, int]] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | bytes):
            file = os.fsdecode(arguments[0])
            line = _opener(path)
            if line and not file.startswith((sys.prefix, sys.base_prefix, "/proc/", "/sys/", "/dev/")):
                opened.append((file, line))

    sys.addaudithook(watch)  # there is no way to take one away: it looks no further from the end of this block on
    try:
        yield opened
    finally:
        watching = False


def _opener(path: Path) -> int | None:
    """The line of `path` that runs, with no import between it and now."""
    frame = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file == str(path.absolute()):
            return frame.f_lineno
        if file.startswith("<frozen importlib"):
            return None
        frame = frame.f_back
    return None
