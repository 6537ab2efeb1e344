"""Which file and runtime serve a net on this machine: the fastest of those that answer as they should."""

import importlib.metadata
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.cores import num_cores
from common.documents import read_object
from common.files import read_whole, write_whole
from common.refusal import Refusal
from export.compare import ALLOWED_DROP, INT8_AGREEMENT, TOLERANCES
from export.model_file.onnx_reader import Header, digest_of, read_header
from export.runtimes.load import NAMED_ONLY, RUNTIMES, RuntimeName, load_runtime
from export.runtimes.mnn_module import is_installed, why_not
from export.runtimes.runtime import Runtime
from export.runtimes.saturation import warning
from export.timing import geometric_means, time_answers
from serve.model.check import check

_log = logging.getLogger(__name__)

MEASURE_S = 1.0
FORMAT = "diracnet-runtime-2"  # increase when a runtime computes in another way
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "MNN", "numpy", "torch")


@dataclass(frozen=True)
class Choice:
    """The file that serves; `runtime` is None where the file's suffix determines it."""

    path: Path
    runtime: RuntimeName | None
    reason: str = ""  # for people, where something was chosen


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A file of the net, before any runtime has loaded it."""

    path: Path
    digest: str
    header: Header

    @property
    def export(self) -> dict[str, Any]:
        """The record of the export; empty for a file that this project did not write."""
        return self.header.provenance.get("export", {})


@dataclass(frozen=True, eq=False)  # hashed by identity
class Candidate:
    """A file and a runtime for it."""

    file: ModelFile
    runtime: RuntimeName

    def __str__(self) -> str:
        return f"{self.file.path.name} on {self.runtime}"

    @property
    def key(self) -> list[str]:
        return [self.file.digest, self.runtime]

    def chosen(self, reason: str) -> Choice:
        return Choice(self.file.path, self.runtime, reason)


def choose(
    paths: Sequence[Path],
    *,
    runtime: RuntimeName | None,
    devices: Sequence[int],
    num_threads: int,
    max_batch: int,
    load: Callable[..., Runtime] = load_runtime,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """The file and runtime with the least time, as a geometric mean over batches of 1 and of `max_batch`.

    `paths` are forms of one net; `runtime` is the only one allowed, or None. Nothing is measured if only one candidate
    is left, or if a valid measurement is stored beside the first file. Refuses forms of different nets.
    """
    if len(paths) == 1 and (runtime or paths[0].suffix != ".onnx"):
        return Choice(paths[0], runtime)
    files = [_read(path) for path in paths]
    _refuse_different_nets(files)
    candidates = _candidates(files, runtime, has_devices=bool(devices))
    if len(candidates) == 1:
        return candidates[0].chosen(f"{candidates[0].file.path.name} alone fits" if len(paths) > 1 else "")
    conditions = Conditions([candidate.key for candidate in candidates], num_threads, list(devices), max_batch)
    if choice := _recall(paths[0], conditions, candidates):
        return choice
    _log.info("measuring %d ways to run the net", len(candidates))
    runtimes = _load(candidates, load, device=devices[0] if devices else None, num_threads=num_threads)
    best, reason = next(iter(runtimes)), "alone passes"
    if len(runtimes) > 1:
        image, sizes = runtimes[best].model.spec.image, sorted({1, max_batch})
        ways = {str(index): candidate for index, candidate in enumerate(runtimes)}
        answers = {way: runtimes[candidate] for way, candidate in ways.items()}
        means = geometric_means(time_answers(answers, image, sizes, limit_s=MEASURE_S, clock=clock))
        (way, best_ms), (_, next_ms), *_ = means.items()
        best, reason = ways[way], f"is {next_ms / best_ms:.1f}x the next of {len(means)}"
    return best.chosen(_remember(paths[0], conditions, best, f"{best} {reason}"))


def why_unfit(export: dict[str, Any]) -> str | None:
    """Why a form must not be chosen for its speed, by the record of its export; None if it may be.

    Eight bits change answers, so speed alone does not justify them. They are a candidate only if the export measured,
    on test images, that they lose no more accuracy than `ALLOWED_DROP` and keep the classes that parity demands. A form
    without that record, or with a worse one, serves only if it is the only file named.
    """
    precision, test = export.get("precision", "fp32"), export.get("test")
    if precision in TOLERANCES and not TOLERANCES[precision].is_statistical:
        return None
    if test is None:
        return f"its file does not record what {precision} costs on test images"
    if test["float32_accuracy"] - test["accuracy"] > ALLOWED_DROP:
        return f"it loses more than {100 * ALLOWED_DROP:.1f} points of test accuracy"
    if test["top1_agreement"] < INT8_AGREEMENT:
        return f"it keeps the class of only {100 * test['top1_agreement']:.1f} % of the test images"
    return None


def _read(path: Path) -> ModelFile:
    if path.suffix != ".onnx":
        raise Refusal(f"{path} is not an .onnx file, and only those can be chosen from; serve it alone")
    content = read_whole(path)
    header = read_header(Path(path.name), content)
    return ModelFile(path, digest_of(path, content), header)


def _refuse_different_nets(files: Sequence[ModelFile]) -> None:
    """Names the field of the spec, or the digest, that differs."""
    first, *others = files
    for other in others:
        before, after = ({**_spec(file), "plain_sha256": file.export.get("plain_sha256")} for file in (first, other))
        for name, expected in before.items():
            found = after.get(name)
            if found != expected and (name != "plain_sha256" or None not in (found, expected)):
                raise Refusal(
                    f"{other.path} is of another net than {first.path}: {name} is {found}, not {expected}; "
                    "export both from one plain.safetensors"
                )


def _spec(file: ModelFile) -> dict[str, Any]:
    if "spec" not in file.header.metadata:
        raise Refusal(f"{file.path} does not say what net it is of; serve it alone")
    return read_object(file.header.metadata["spec"], f"the spec in {file.path}", todo="export it again")


def _candidates(files: Sequence[ModelFile], runtime: RuntimeName | None, *, has_devices: bool) -> list[Candidate]:
    """The candidates worth loading, by the records in the files; refuses if there are none."""
    found: list[Candidate] = []
    for file in files:
        reason = why_unfit(file.export) or warning(file.path, read_whole(file.path)) if len(files) > 1 else None
        if reason:
            _log.warning("%s is not chosen: %s", file.path.name, reason)
            continue
        allowed = [runtime] if runtime else [name for name in RUNTIMES[".onnx"] if name not in NAMED_ONLY]
        if not is_installed() or has_devices or why_not(file.header):
            allowed = [name for name in allowed if name != "mnn"]
        found += [Candidate(file, name) for name in allowed if name in RUNTIMES[".onnx"]]
    if not found:
        named = " and ".join(file.path.name for file in files)
        raise Refusal(f"neither of {named} can be chosen{f' for {runtime}' if runtime else ''}; name one file alone")
    return found


def _load(
    candidates: Sequence[Candidate], load: Callable[..., Runtime], *, device: int | None, num_threads: int
) -> dict[Candidate, Runtime]:
    """Those that load and answer their probe images; refuses if none does, with the first one's reason."""
    runtimes: dict[Candidate, Runtime] = {}
    refusals = []
    for candidate in candidates:
        try:
            runtime = load(candidate.file.path, name=candidate.runtime, device=device, num_threads=num_threads)
            check(runtime)
        except Refusal as refusal:
            _log.warning("%s is not chosen: %s", candidate, refusal)
            refusals.append(refusal)
        else:
            runtimes[candidate] = runtime
    if not runtimes:
        raise refusals[0]
    return runtimes


@dataclass(frozen=True)
class Conditions:
    """Everything that can change which candidate is fastest; under other conditions it is measured again."""

    candidates: list[list[str]]  # digest of the file, and the runtime's name
    num_threads: int  # of one worker's model
    devices: list[int]
    max_batch: int
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    processor: str = field(default_factory=lambda: _processor())
    num_cores: int = field(default_factory=lambda: num_cores())


def record_path(model: Path) -> Path:
    """Where a measured choice is stored."""
    return model.with_name(model.name + ".runtime.json")


def _recall(model: Path, conditions: Conditions, candidates: Sequence[Candidate]) -> Choice | None:
    """The candidate that was chosen under the same conditions; None without a readable record."""
    file = record_path(model)
    with suppress(OSError, ValueError, KeyError, TypeError):  # missing, unreadable, damaged or another file
        record = json.loads(file.read_bytes())
        if record["format"] == FORMAT and record["conditions"] == asdict(conditions):
            chosen = (candidate for candidate in candidates if candidate.key == record["chosen"])
            return next((candidate.chosen(f"{record['reason']}, as {file} says") for candidate in chosen), None)
    return None


def _remember(model: Path, conditions: Conditions, best: Candidate, reason: str) -> str:
    """Store the choice; the reason and where it is stored. In a read-only folder, each start measures again."""
    record = {"format": FORMAT, "chosen": best.key, "reason": reason, "conditions": asdict(conditions)}
    try:
        path = write_whole(record_path(model), (json.dumps(record, indent=1) + "\n").encode())
    except Refusal as refusal:
        return f"{reason}, not kept: {refusal}"
    return f"{reason}, kept in {path}"


def _versions() -> dict[str, str]:
    """Of the installed packages that compute."""
    versions = {}
    for name in DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _processor() -> str:
    """The processor's name, if the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
