"""Which file and runtime serve a net on this machine: the fastest of those that answer as they should."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.documents import read_object
from common.environment import num_cores, processor, versions
from common.files import read_whole, write_whole
from common.refusal import Refusal
from export.compare import ALLOWED_DROP, INT8_AGREEMENT, TOLERANCES
from export.model_file.onnx_reader import Header, digest_of, read_header
from export.runtimes.load import NAMED_ONLY, RUNTIMES, RuntimeName, load_runtime
from export.runtimes.mnn_module import is_installed, why_not
from export.runtimes.runtime import Runtime
from export.runtimes.saturation import warning
from export.timing import geometric_means, time_answers
from serve.config import ServeConfig
from serve.model.check import check
from serve.model.load import num_threads

_log = logging.getLogger(__name__)

MEASURE_S = 1.0
FORMAT = "diracnet-runtime-2"  # increase when a runtime computes in another way
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "MNN", "numpy", "torch")


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


@dataclass(frozen=True, eq=False)
class Candidate:
    """A file and a runtime for it."""

    file: ModelFile
    runtime: RuntimeName

    def __str__(self) -> str:
        return f"{self.file.path.name} on {self.runtime}"

    @property
    def key(self) -> list[str]:
        return [self.file.digest, self.runtime]


def choose(
    config: ServeConfig, *, load: Callable[..., Runtime] = load_runtime, clock: Callable[[], float] = time.perf_counter
) -> tuple[ServeConfig, str]:
    """`config` with one file and its runtime, and the reason for people, "" if there was nothing to choose from.

    They have the least time, as a geometric mean over batches of 1 and of `max_batch`. The files of `config` are forms
    of one net. Nothing is measured if only one candidate is left, or if a valid measurement is stored beside the first
    file. Refuses forms of different nets.
    """
    paths = config.model_paths
    if len(paths) == 1 and (config.runtime_name or paths[0].suffix != ".onnx"):
        return config, ""
    files = [_read(path) for path in paths]
    _refuse_different_nets(files)
    best, *others = candidates = _candidates(files, config)
    reason = f"{best.file.path.name} alone fits" if len(files) > 1 else ""
    if others:
        record, conditions = record_path(paths[0]), conditions_of(config, candidates)
        best, reason = _recall(record, conditions, candidates) or _remember(
            record, conditions, *_measure(candidates, config, load, clock)
        )
    return replace(config, models=(best.file.path,), runtime=best.runtime), reason


def why_unfit(export: dict[str, Any]) -> str | None:
    """Why a form must not be chosen for its speed, by the record of its export; None if it may be.

    Eight bits change answers, so speed alone does not justify them. They are a candidate only if the export measured,
    on test images, that they lose no more accuracy than `ALLOWED_DROP` and keep the classes that parity demands. A form
    without that record, or with a worse one, serves only if it is the only file named.
    """
    precision, test = export.get("precision", "fp32"), export.get("test")
    try:
        if precision in TOLERANCES and not TOLERANCES[precision].is_statistical:
            return None
        if test is None:
            return f"its file does not record what {precision} costs on test images"
        if not test["float32_accuracy"] - test["accuracy"] <= ALLOWED_DROP:  # nor for NaN
            return f"it loses more than {100 * ALLOWED_DROP:.1f} points of test accuracy"
        if not test["top1_agreement"] >= INT8_AGREEMENT:
            return f"it keeps the class of only {100 * test['top1_agreement']:.1f} % of the test images"
    except (TypeError, KeyError) as error:
        return f"the record of its export is damaged ({error!r})"
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
                    f"{other.path} belongs to a different net than {first.path}: {name} is {found}, not {expected}; "
                    "export both from one plain.safetensors"
                )


def _spec(file: ModelFile) -> dict[str, Any]:
    if "spec" not in file.header.metadata:
        raise Refusal(f"{file.path} does not say what net it is of; serve it alone")
    return read_object(file.header.metadata["spec"], f"the spec in {file.path}", todo="export it again")


def _candidates(files: Sequence[ModelFile], config: ServeConfig) -> list[Candidate]:
    """The candidates worth loading, by the records in the files; refuses if there are none."""
    found: list[Candidate] = []
    runtime = config.runtime_name
    for file in files:
        reason = why_unfit(file.export) or warning(file.path, read_whole(file.path)) if len(files) > 1 else None
        if reason:
            _log.warning("%s is not chosen: %s", file.path.name, reason)
            continue
        allowed = [runtime] if runtime else [name for name in RUNTIMES[".onnx"] if name not in NAMED_ONLY]
        if not is_installed() or config.devices or why_not(file.header):
            allowed = [name for name in allowed if name != "mnn"]
        found += [Candidate(file, name) for name in allowed if name in RUNTIMES[".onnx"]]
    if not found:
        named = " and ".join(file.path.name for file in files)
        raise Refusal(f"neither of {named} can be chosen{f' for {runtime}' if runtime else ''}; name one file alone")
    return found


def _measure(
    candidates: Sequence[Candidate], config: ServeConfig, load: Callable[..., Runtime], clock: Callable[[], float]
) -> tuple[Candidate, str]:
    """The fastest of the candidates that load, and by how much."""
    _log.info("measuring %d ways to run the net", len(candidates))
    device = config.devices[0] if config.devices else None
    ways = _load(candidates, partial(load, device=device, num_threads=num_threads(config)))
    if len(ways) == 1:
        return ways[0][0], "alone passes"
    image, sizes = ways[0][1].model.spec.image, sorted({1, config.max_batch})
    answers = {str(index): runtime for index, (_, runtime) in enumerate(ways)}
    means = geometric_means(time_answers(answers, image, sizes, limit_s=MEASURE_S, clock=clock))
    (best, best_ms), (_, next_ms), *_ = means.items()
    return ways[int(best)][0], f"is {next_ms / best_ms:.1f}x the next of {len(means)}"


def _load(candidates: Sequence[Candidate], load: Callable[..., Runtime]) -> list[tuple[Candidate, Runtime]]:
    """Those that load and answer their probe images; refuses if none does, with the first one's reason."""
    loaded, refusals = [], []
    for candidate in candidates:
        try:
            runtime = load(candidate.file.path, name=candidate.runtime)
            check(runtime)
        except Refusal as refusal:
            _log.warning("%s is not chosen: %s", candidate, refusal)
            refusals.append(refusal)
        else:
            loaded.append((candidate, runtime))
    if not loaded:
        raise refusals[0]
    return loaded


def conditions_of(config: ServeConfig, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Everything that can change which candidate is fastest; under other conditions it is measured again."""
    return {
        "candidates": [candidate.key for candidate in candidates],
        "num_threads": num_threads(config),
        "devices": list(config.devices),
        "max_batch": config.max_batch,
        "versions": versions(*DISTRIBUTIONS),
        "processor": processor(),
        "num_cores": num_cores(),
    }


def record_path(model: Path) -> Path:
    """Where a measured choice is stored."""
    return model.with_name(model.name + ".runtime.json")


def _recall(file: Path, conditions: dict[str, Any], candidates: Sequence[Candidate]) -> tuple[Candidate, str] | None:
    """The candidate that was chosen under the same conditions, and why; None without a readable record."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # missing, unreadable, damaged or another file
        record = json.loads(file.read_bytes())
        if record["format"] == FORMAT and record["conditions"] == conditions:
            reason = f"{record['reason']}, as {file} says"
            return next(((candidate, reason) for candidate in candidates if candidate.key == record["chosen"]), None)
    return None


def _remember(file: Path, conditions: dict[str, Any], best: Candidate, reason: str) -> tuple[Candidate, str]:
    """Store the choice and say where. In a read-only folder, each start measures again."""
    reason = f"{best} {reason}"
    record = {"format": FORMAT, "chosen": best.key, "reason": reason, "conditions": conditions}
    try:
        write_whole(file, (json.dumps(record, indent=1) + "\n").encode())
    except Refusal as refusal:
        return best, f"{reason}, not kept: {refusal}"
    return best, f"{reason}, kept in {file}"
