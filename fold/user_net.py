"""A user's own net, made by a function in their file or by its name in timm, and its weights."""

import contextlib
import importlib.util
import inspect
import os
import sys
import traceback
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.files import read_whole, sha256
from common.refusal import Refusal, first_of, one_line
from train.checkpoint import misfits, read_pickle, read_safetensors

SEED = 0  # of a net's initial weights, used if no others are given
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts keep weights
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
COUNTER = "num_batches_tracked"  # of batch norm; not used in evaluation mode
State = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """A net, its name, and what timm or the user says about its images; empty where neither does."""

    net: nn.Module
    name: str
    record: dict[str, Any]  # where it comes from
    image_size: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None
    labels: tuple[str, ...] = ()


def from_file(where: str) -> Made:
    """The net that `FILE.py:FUNCTION` returns; FUNCTION takes no arguments, and is `make` if not named.

    The file is imported with its own folder first on Python's path. Refuses, with the line, what it raises.
    """
    file, colon, function = where.partition(".py")
    path, function = Path(file + ".py"), function.removeprefix(":") or "make"
    if not colon or not path.is_file():
        raise Refusal(f"{where} is neither a checkpoint (.pt) nor FILE.py:FUNCTION of a file that exists")
    torch.random.manual_seed(SEED)  # pyright: ignore[reportUnknownMemberType]
    # Output of the file must not mix with a result on stdout.
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            net = _call(path, _import(path), function)
    finally:
        sys.path.remove(folder)
    if not isinstance(net, nn.Module):
        kind = type(net).__name__
        what = f"the class {net.__name__}: call it" if isinstance(net, type) else f"an object of the type {kind}"
        raise Refusal(f"{path}: {function} returns {what}; it must return a torch.nn.Module")
    name = type(net).__name__
    return Made(net, path.stem if name == "Sequential" else name, {"made_by": f"{path.name}:{function}"})


def from_timm(name: str, *, num_classes: int | None) -> Made:
    """The net that timm calls `name`, without its published weights, which would be downloaded."""
    try:
        timm, timm_data = (importlib.import_module(module) for module in ("timm", "timm.data"))
    except ImportError as error:
        raise Refusal(f"--timm needs timm, which does not load ({error}): pip install timm") from error
    if not timm.is_model(name):
        close = ", ".join(get_close_matches(name, map(str, timm.list_models()), 3))
        raise Refusal(f"timm has no net {name}; {f'similar are {close}' if close else 'see timm.list_models()'}")
    torch.random.manual_seed(SEED)  # pyright: ignore[reportUnknownMemberType]
    net = timm.create_model(name, pretrained=False, **({"num_classes": num_classes} if num_classes else {}))
    said: dict[str, Any] = timm_data.resolve_data_config({}, pretrained_cfg=net.pretrained_cfg)
    subset = None if num_classes else timm_data.infer_imagenet_subset(net)
    labels = tuple(timm_data.ImageNetInfo(subset).label_descriptions()) if subset else ()
    _, height, width = said["input_size"]
    # timm's other modes stretch the image or add a border, which a spec cannot express.
    resize = int(height / said["crop_pct"]) if said["crop_mode"] == "center" and height == width else None
    mean, std = (tuple(map(float, said[key])) for key in ("mean", "std"))
    record = {"made_by": f"timm {timm.__version__}: {name}"}
    return Made(net, name, record, (height, width), mean, std, resize, labels)


def load_weights(net: nn.Module, path: Path) -> str:
    """Load all weights of a file into `net`, without executing code from it; returns its sha256.

    The file is safetensors or a state dict that `torch.save` wrote. Refuses weights that do not fit.
    """
    content = read_whole(path)
    state = _without_prefixes(_read_state(path, content))
    own = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    optional = {name for name in own.keys() ^ state.keys() if name.endswith(COUNTER)}
    given = {name: tensor for name, tensor in state.items() if name not in optional}
    if wrong := misfits(given, {name: shape for name, shape in own.items() if name not in optional}):
        raise Refusal(f"{path} does not fit the net: {first_of(wrong, 9)}; name the weights of this very net")
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise Refusal(f"{path} holds NaN or infinite values in {first_of(bad)}: the training diverged")
    net.load_state_dict(state, strict=False)
    return sha256(content)


def _import(path: Path) -> ModuleType:
    """The module of a file, under a name that no other module has. Refuses one that fails or opens files."""
    name = f"the_users.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    opened: list[tuple[str, int]] = []  # by the code of `path` itself, with its lines; not by its imports
    is_running, raised = True, None

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if is_running and event == "open" and isinstance(arguments[0], str | bytes):
            file, line = os.fsdecode(arguments[0]), _running_line(path)
            if line and not file.startswith((sys.prefix, sys.base_prefix, "/proc/", "/sys/", "/dev/")):
                opened.append((file, line))

    sys.addaudithook(watch)  # a hook cannot be removed; afterwards it is idle
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raised = error
    is_running = False
    if opened:
        file, line = opened[0]
        raise Refusal(
            f"{path}, line {line}, reads {file} when it is imported: let it define nets only, "
            "and give their weights with --weights"
        )
    if raised:
        raise Refusal(f"{path}{_line(path, raised)}: the file cannot be imported: {_shown(raised)}") from raised
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
        raise Refusal(f"{path}: {function} is called without arguments: {error}; write one that has none") from error
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise Refusal(f"{path}{_line(path, error)}: {function} raises {_shown(error)}") from error


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _line(path: Path, error: BaseException) -> str:
    """The line of the file that an exception comes from, if known."""
    file, frames = str(path.absolute()), traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def _running_line(path: Path) -> int | None:
    """The line of `path` that is running, unless an import is running within it."""
    frame = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file == str(path.absolute()):
            return frame.f_lineno
        if file.startswith("<frozen importlib"):
            return None
        frame = frame.f_back
    return None


def _read_state(path: Path, content: bytes) -> State:
    if path.suffix == ".safetensors":
        return read_safetensors(path, content)
    todo = "save them with torch.save(net.state_dict(), FILE) or as safetensors"
    found = read_pickle(content, lambda kind: f"{path} cannot be read as weights ({kind}); {todo}")
    while isinstance(found, dict):
        entries = cast("dict[Any, Any]", found)
        if entries and all(isinstance(value, Tensor) for value in entries.values()):
            return {str(key): value for key, value in entries.items()}
        inner = next((entries[key] for key in WRAPPERS if isinstance(entries.get(key), dict)), None)
        if inner is None:
            keys = ", ".join(str(key) for key in list(entries)[:5]) or "nothing"
            raise Refusal(
                f"{path} holds {keys}, and no state dict under {', '.join(WRAPPERS)}; "
                "save it with torch.save(net.state_dict(), FILE)"
            )
        found = inner
    raise Refusal(f"{path} holds a {type(found).__name__}, not a state dict; save net.state_dict()")


def _without_prefixes(state: State) -> State:
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return _without_prefixes({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state
