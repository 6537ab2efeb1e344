"""The model that serves, loaded from its files and checked; on a reload, first tried in another process."""

import logging
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse

from common.documents import read_json
from common.environment import num_cores
from common.files import read_whole, write_whole
from common.refusal import Refusal
from export.model_file.onnx_reader import digest_of
from export.model_file.reading import from_flags
from export.runtimes.cascade import Cascade, read_forms
from export.runtimes.load import load_runtime
from export.runtimes.runtime import Model, Runtime
from export.runtimes.saturation import warning
from serve.config import ServeConfig
from serve.model.check import check
from serve.model.copies import copied, keep, kept
from serve.model.process import ModelProcess
from serve.request.app import model_card
from serve.watching.answers import with_sound_reference

_SHOWN = ("images", "num_images", "relative", "top1_agreement", "within_tolerance")  # to clients: no paths
_SERVES = "serves"  # in the workers' folder; holds 1 if the shadow of the command line serves
_log = logging.getLogger(__name__)


class Roles:
    """`served` and `shadow` are the configs of the model that serves and of its shadow; promotion swaps them.

    Workers share the state through a file in `home`.
    """

    def __init__(self, config: ServeConfig, home: Path | None = None) -> None:
        self._configs = [config]
        if config.shadow:  # in the first runtime of its kind, in which it is also compared
            self._configs.append(replace(config, models=(config.shadow,), runtime="auto"))
        self._file = home / _SERVES if home else None
        self._index = 0

    @property
    def served(self) -> ServeConfig:
        """The config that a reload reads."""
        index = self._current()
        if index:
            first, promoted = (config.model_paths[0].name for config in self._configs)
            _log.warning("reading %s, which was promoted; after a restart, the server serves %s again", promoted, first)
        return self._configs[index]

    @property
    def shadow(self) -> ServeConfig:
        return self._configs[1 - self._current()]

    def swap(self) -> None:
        """The shadow serves from now on, in all workers."""
        self._index = 1 - self._current()
        if self._file:
            write_whole(self._file, b"%d" % self._index)

    def _current(self) -> int:
        return int(self._file.read_text()) if self._file and self._file.exists() else self._index


def load(config: ServeConfig) -> list[Runtime]:
    """The model, checked, once for each device. Refusals name the file without its folder."""
    paths = config.model_paths
    with _by_name(paths):
        forms = read_forms(paths) if config.cascade else None
        runtimes: list[Runtime] = []
        for device in config.devices or (None,):
            loaded = {path: _load_file(config, path, device) for path in paths}
            runtime = loaded[paths[0]]
            if forms:
                runtime = Cascade(loaded[forms.quick], loaded[forms.exact], forms.evidence)
                check(runtime)
            _refuse_what_cannot_be_shown(runtime)
            runtimes.append(runtime)
        for path in paths:
            if path.suffix == ".onnx" and not config.devices and (doubt := warning(path, read_whole(path))):
                _log.warning(doubt)
    return runtimes


def load_again(config: ServeConfig, home: Path | None = None, digest: str | None = None) -> list[Runtime]:
    """The model as its files are now, tried in another process first; `home` keeps the copy of the files that is tried.

    Refuses a file with another digest than `digest`.
    """
    paths = config.model_paths
    with _by_name(paths), copied(paths, home) as copies:
        if digest and digest != digest_of(copies[0], read_whole(copies[0])):
            raise Refusal(f"{paths[0]} is another file than the one that was compared; reload to compare it")
        config = replace(config, models=copies)
        with ModelProcess(config, stderr=subprocess.DEVNULL):
            pass  # it loads, answers and can be loaded here
        runtimes = load(config)
        if home:
            keep(home, copies, runtimes[0].model.digest)
    return runtimes


def load_first(roles: Roles, home: Path) -> list[Runtime]:
    """The model that served last, or if none has, the one in the files."""
    config = roles.served
    paths = config.model_paths
    if last := kept(home, paths):
        return load(replace(config, models=last))
    with _by_name(paths), copied(paths, home) as copies:
        runtimes = load(replace(config, models=copies))
        keep(home, copies, runtimes[0].model.digest)
    return runtimes


def num_threads(config: ServeConfig) -> int:
    """Of one model on the CPU."""
    if config.front_ends > 1:
        return config.model_threads or max(1, (num_cores() - config.front_ends) // max(1, len(config.devices)))
    return config.model_threads or max(1, num_cores() // config.workers)


def _load_file(config: ServeConfig, path: Path, device: int | None) -> Runtime:
    runtime = load_runtime(
        path,
        name=config.runtime_name,
        device=device,
        num_threads=num_threads(config),
        shares_cores=config.cascade,
        hints=from_flags(config),
    )
    runtime.model = with_sound_reference(_with_parity_report(runtime.model, path))
    check(runtime)
    return runtime


def _with_parity_report(model: Model, path: Path) -> Model:
    """`model` with the comparisons that export/parity.py wrote beside `path` as its provenance's `parity`.

    A file of that name that is not a report, or is about another model, is ignored.
    """
    report = path.with_suffix(".json")
    if not report.exists():
        return model
    try:
        document = read_json(read_whole(report))
        if model.digest not in document["artefacts"].values():
            raise ValueError(f"it is about another model than {path.name}")
        parity: list[dict[str, Any]] = [{name: row[name] for name in _SHOWN} for row in document["parity"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("%s is ignored, as it is not a report of export/parity.py on this model: %r", report.name, error)
        return model
    return replace(model, provenance={**model.provenance, "parity": parity})


def _refuse_what_cannot_be_shown(runtime: Runtime) -> None:
    """GET /model and every answer describe the model, which must be possible in JSON."""
    try:
        JSONResponse(model_card(runtime))
    except (ValueError, TypeError, RecursionError) as error:
        raise Refusal(f"what {runtime.model.name} says of itself cannot be shown: {error}; export it again") from error


@contextmanager
def _by_name(paths: Sequence[Path]) -> Iterator[None]:
    """Refusals name `paths` without their folders."""
    try:
        yield
    except Refusal as refusal:
        message = str(refusal)
        for path in paths:
            message = message.replace(str(path), path.name)
        raise Refusal(message) from refusal
