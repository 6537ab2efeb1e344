"""Which form of a net serves on this machine: the fastest of those that answer as they should."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.documents import read_object
from common.files import read_whole
from common.refusal import Refusal
from export.compare import ALLOWED_DROP, INT8_AGREEMENT, TOLERANCES
from export.model_file.onnx_reader import Header, digest_of, read_header
from export.runtimes.load import NAMED_ONLY, RUNTIMES, RuntimeName, load_runtime
from export.runtimes.mnn.module import is_installed, why_not
from export.runtimes.runtime import Runtime
from export.runtimes.saturation import warning
from export.timing import geometric_means, time_answers
from serve.model.check import check
from serve.model.remembered import Conditions, recall, remember

_log = logging.getLogger(__name__)

MEASURE_S = 1.0


@dataclass(frozen=True)
class Choice:
    """What serves; the runtime is None where the file's suffix says it."""

    path: Path
    runtime: RuntimeName | None
    reason: str = ""  # for people, where something was chosen


@dataclass(frozen=True, eq=False)  # a key of dictionaries, as itself
class Form:
    """A file of the net, before any runtime has seen it."""

    path: Path
    digest: str
    header: Header

    @property
    def export(self) -> dict[str, Any]:
        """What the export recorded; empty for somebody else's net."""
        return self.header.provenance.get("export", {})


Candidate = tuple[Form, RuntimeName]


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

    `paths` are forms of one net; `runtime` is the only one allowed, or None. Nothing is measured where one
    candidate is left, or where the measurement lies beside the first file. Refuses forms of different nets.
    """
    if len(paths) == 1 and (runtime or paths[0].suffix != ".onnx"):
        return Choice(paths[0], runtime)
    forms = [_read(path) for path in paths]
    _refuse_different_nets(forms)
    candidates = _candidates(forms, runtime, has_devices=bool(devices))
    if len(candidates) == 1:
        form, name = candidates[0]
        return Choice(form.path, name, f"{form.path.name} alone fits" if len(paths) > 1 else "")
    conditions = Conditions.here(
        [(form.digest, name) for form, name in candidates],
        devices=devices,
        num_threads=num_threads,
        max_batch=max_batch,
    )
    files = {form.digest: form.path for form in forms}
    if kept := recall(paths[0], conditions):
        return Choice(files[kept.digest], kept.runtime, kept.reason)
    _log.info("measuring %d ways to run the net", len(candidates))
    runtimes = _load(candidates, load, device=devices[0] if devices else None, num_threads=num_threads)
    form, name = next(iter(runtimes))
    reason = f"{_said(form, name)} alone passes"
    if len(runtimes) > 1:
        form, name, reason = _fastest(runtimes, max_batch, clock)
    return Choice(form.path, name, remember(paths[0], conditions, form.digest, name, reason))


def why_unfit(export: dict[str, Any]) -> str | None:
    """Why a form must not be chosen for its speed, by the record of its export; None where it may.

    Eight bits change answers, so speed alone does not justify them. They are taken where the export measured on test
    images that they cost no more accuracy than it allows itself and keep the classes that parity demands; a form
    without that record, or with a worse one, serves only where it is the one file named.
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


def _read(path: Path) -> Form:
    if path.suffix != ".onnx":
        raise Refusal(f"{path} is no .onnx file, and only those can be chosen from; serve it alone")
    content = read_whole(path)
    header = read_header(Path(path.name), content)
    return Form(path, digest_of(path, content), header)


def _refuse_different_nets(forms: Sequence[Form]) -> None:
    """Names the field of the spec, or the digest, that differs."""
    first, *others = forms
    for other in others:
        before, after = ({**_spec(form), "plain_sha256": form.export.get("plain_sha256")} for form in (first, other))
        for name, expected in before.items():
            found = after.get(name)
            if found != expected and (name != "plain_sha256" or None not in (found, expected)):
                raise Refusal(
                    f"{other.path} is of another net than {first.path}: {name} is {found}, not {expected}; "
                    "export both from one plain.safetensors"
                )


def _spec(form: Form) -> dict[str, Any]:
    if "spec" not in form.header.metadata:
        raise Refusal(f"{form.path} does not say what net it is of; serve it alone")
    return read_object(form.header.metadata["spec"], f"the spec in {form.path}", todo="export it again")


def _candidates(forms: Sequence[Form], runtime: RuntimeName | None, *, has_devices: bool) -> list[Candidate]:
    """What is worth loading, by what the files say of themselves; refuses where that is nothing."""
    found: list[Candidate] = []
    for form in forms:
        reason = why_unfit(form.export) or warning(form.path, read_whole(form.path)) if len(forms) > 1 else None
        if reason:
            _log.warning("%s is not chosen: %s", form.path.name, reason)
            continue
        on_mnn = is_installed() and not has_devices and why_not(form.header) is None
        for name in RUNTIMES[".onnx"]:
            is_meant = name == runtime or (runtime is None and name not in NAMED_ONLY)
            if is_meant and (name != "mnn" or on_mnn):
                found.append((form, name))
    if not found:
        named = " and ".join(form.path.name for form in forms)
        raise Refusal(f"neither of {named} can be chosen{f' for {runtime}' if runtime else ''}; name one file alone")
    return found


def _load(
    candidates: Sequence[Candidate], load: Callable[..., Runtime], *, device: int | None, num_threads: int
) -> dict[Candidate, Runtime]:
    """Those that load and answer their probe images; refuses where none does, with what was said of the first."""
    runtimes: dict[Candidate, Runtime] = {}
    refusals = []
    for form, name in candidates:
        try:
            runtime = load(form.path, name=name, device=device, num_threads=num_threads)
            check(runtime)
        except Refusal as refusal:
            _log.warning("%s is not chosen: %s", _said(form, name), refusal)
            refusals.append(refusal)
        else:
            runtimes[form, name] = runtime
    if not runtimes:
        raise refusals[0]
    return runtimes


def _fastest(
    runtimes: dict[Candidate, Runtime], max_batch: int, clock: Callable[[], float]
) -> tuple[Form, RuntimeName, str]:
    candidates = {str(index): candidate for index, candidate in enumerate(runtimes)}
    answers = dict(zip(candidates, runtimes.values(), strict=True))
    image = next(iter(runtimes.values())).model.spec.image
    means = geometric_means(time_answers(answers, image, sorted({1, max_batch}), limit_s=MEASURE_S, clock=clock))
    (best, best_ms), (_, next_ms), *_ = means.items()
    form, name = candidates[best]
    return form, name, f"{_said(form, name)} is {next_ms / best_ms:.1f}x the next of {len(means)}"


def _said(form: Form, name: RuntimeName) -> str:
    return f"{form.path.name} on {name}"
