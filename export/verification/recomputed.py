"""Claims about many images: the fold's proof, parity, test accuracy, and what eight bits lose."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from common.difference import TOLERANCES as FOLD_TOLERANCES
from common.difference import keeps_class
from common.progress import progress
from common.refusal import Refusal, first_of
from export.artefacts import Artefact
from export.compare import ALLOWED_DROP, TOLERANCES, answer_part
from export.eight_bits.escalation import count_changes
from export.eight_bits.quantize import measure_drop
from export.pairs import ParityRow, by_precision, compare_logits
from export.runtimes.cascade import RECORD, Evidence
from export.verification.chain import Chain
from export.verification.claims import CheckedClaim, damaged, judged, shown, unchecked
from fold.graph import fold
from fold.image_sets import NUM_RANDOM, extreme_images, random_images
from fold.proof import ProofRow, prove
from train.checkpoint import load_net
from train.data import datasets
from train.data.folder import Changed, Unlike

NUM_REAL = 500  # the default of fold/run.py and export/parity.py
MOST_REAL = 10_000
MOST_PIXEL_BYTES = 2**28  # of the random images of one comparison
OF_IMAGES = ("dataset", "split", "validation", "seed", "skip_unreadable")  # entries that name a run's images

Logits = tuple[np.ndarray | None, np.ndarray | None]  # [N, K] of the float32 form and of this one, if at hand


@dataclass(frozen=True)
class FoundImages:
    """Those of the model's data set, or why they are not at hand, and the claims about the data set itself."""

    part: datasets.Part | None
    missing: str
    rows: tuple[CheckedClaim, ...] = ()

    def first(self, num: int) -> np.ndarray | None:
        return self.part.first(min(num, MOST_REAL)) if self.part is not None and num else None


def find_images(chain: Chain, data_dir: Path | None) -> FoundImages:
    """The data set that the record of the training names, divided as it says."""
    named = {name: chain.claims.get(f"training.{name}") for name in OF_IMAGES}
    training = {name: value for name, value in named.items() if value is not None}
    if checkpoint := chain.forms.get("the checkpoint"):  # it knows where the data set lay
        data_folder = checkpoint.source.config.get("data_dir")
        training["data_dir"] = data_folder if isinstance(data_folder, str) else None
    if "dataset" not in training:
        if data_dir:
            raise Refusal(f"{chain.path} does not record what it was trained on: leave --data-dir out")
        return FoundImages(None, "no record says what the net was trained on")
    split, image = training.get("split", {}), chain.spec.image
    said, dataset, missing, verdict = f"sha256 {split.get('sha256', '')}", None, "", "same"
    try:
        dataset = datasets.load_as_trained(training, data_dir=data_dir, beside=chain.path.parent, image=image)
    except Refusal as refusal:
        is_other = isinstance(refusal, Changed | Unlike)
        if data_dir and not is_other:
            raise
        missing, verdict = str(refusal), "differs" if is_other else "cannot be checked here"
    claim = CheckedClaim("images of training, validation and test", said, shown(missing, 160) or said, verdict)
    rows = (claim,) if split or verdict == "differs" else ()
    if dataset is None:
        return FoundImages(None, missing, rows)
    if dataset.info.labels == chain.spec.labels:
        return FoundImages(dataset.test, "", rows)
    why = f"the classes there are {first_of(dataset.info.labels, 5)}"
    labels = judged("labels", shown(", ".join(chain.spec.labels)), shown(why), is_same=False)
    return FoundImages(None, why, (*rows, labels))


def check_images(chain: Chain, images: FoundImages, console: Console) -> Iterator[CheckedClaim]:
    """All claims about images, those of the data set first."""
    yield from images.rows
    height, width, channels = chain.spec.image.shape
    if NUM_RANDOM * height * width * channels > MOST_PIXEL_BYTES:
        what = f"{NUM_RANDOM} images of {height}x{width}"
        yield unchecked("fold, parity and accuracy", "", f"{what} take more memory than a check may")
        return
    yield from _proof(chain, images, console)
    yield from _parity(chain, images, console)
    yield from _accuracy(chain, images, console)


def _proof(chain: Chain, images: FoundImages, console: Console) -> Iterator[CheckedClaim]:
    """The fold is made and proven again from the checkpoint; the logits one by one, of the layers the worst."""
    recorded = [row for part in ("logits", "layers") for row in chain.claims.get(f"fold.{part}") or ()]
    missing, again = images.missing, list[ProofRow]()
    if not (checkpoint := chain.forms.get("the checkpoint")):
        missing = chain.missing("the checkpoint")
    elif sets := _proof_images(recorded, chain, images):
        net = load_net(checkpoint.source)
        with progress(console, "proving the fold again", 2 * sum(map(len, sets.values()))) as advance:
            proof = prove(net, fold(net), sets, advance=advance)
        again = [*proof.ends, *proof.layers]
    for table in dict.fromkeys(map(_table_of, recorded)):
        said, found = ([row for row in rows if _table_of(row) == table] for rows in (recorded, again))
        yield _proof_row(said, {row.what: row for row in found}, missing)


def _table_of(row: ProofRow) -> tuple[bool, str, str]:
    """Logits or layers, in one precision on one kind of images."""
    return row.what == "logits", row.precision, row.images


def _proof_images(recorded: list[ProofRow], chain: Chain, images: FoundImages) -> dict[str, torch.Tensor]:
    """As many of each kind as the record says, if they are at hand."""
    kinds = ("random", "real")
    random, real = (max((row.num_images for row in recorded if row.images == kind), default=0) for kind in kinds)
    sets = {"random": random_images(chain.spec.image, min(random, NUM_RANDOM)), "real": images.first(real)}
    return {kind: torch.as_tensor(some) for kind, some in sets.items() if some is not None and len(some)}


def _proof_row(recorded: list[ProofRow], again: dict[str, ProofRow], missing: str) -> CheckedClaim:
    first, row = recorded[0], max(recorded, key=lambda row: row.relative)
    what = "logits" if first.what == "logits" else f"{len(recorded)} layers"
    claim = f"fold: {what}, {first.precision}, {first.images} images"
    if not again:
        return unchecked(claim, _figure(row), missing)
    wrong = [row for row in recorded if not _is_near(row, again.get(row.what), FOLD_TOLERANCES[row.precision])]
    row = wrong[0] if wrong else row
    found = _figure(again[row.what]) if row.what in again else f"there is no layer {row.what}"
    return judged(claim, _figure(row), found, is_same=not wrong)


def _is_near(recorded: ProofRow, there: ProofRow | None, limit: float) -> bool:
    """Roundings differ from machine to machine, but by less than the error that a fold is allowed."""
    if there is None or not abs(recorded.relative - there.relative) <= limit:
        return False
    counts = (recorded.num_images, recorded.top1_changes) == (there.num_images, there.top1_changes)
    return recorded.what != "logits" or (counts and there.relative <= limit)


def _figure(row: ProofRow) -> str:
    if row.what != "logits":
        return f"{row.what} {row.relative:.1e}, {row.num_images} images"
    return f"{row.relative:.1e}, {row.top1_changes} of {row.num_images} classes changed"


@dataclass(frozen=True)
class ReportedRow:
    """A comparison in a report of export/parity.py, with its figures."""

    where: str
    reference: str
    key: tuple[str, frozenset[str]]  # the kind of images and the digests, whichever file is the reference
    images: str
    num_images: int
    relative: float
    rms: float
    top1_agreement: float
    within_tolerance: bool | None

    def __str__(self) -> str:
        return f"{self.relative:.1e}, rms {self.rms:.1e}, {100 * self.top1_agreement:.2f} % of {self.num_images}"


def _reported(where: str, report: dict[str, Any]) -> Iterator[ReportedRow | CheckedClaim]:
    """The comparisons of a report; for a damaged one, its row of the result."""
    kinds = {"images": str, "num_images": int, "relative": float, "rms": float, "top1_agreement": float}
    for row in report["parity"]:
        try:
            names = [str(row[side]).partition(" on ")[0] for side in ("reference", "candidate")]
            figures = {name: kind(row[name]) for name, kind in kinds.items()}
            key = figures["images"], frozenset(str(report["artefacts"][name]) for name in names)
            reference = shown(Path(names[0]).name)
            yield ReportedRow(where, reference, key, within_tolerance=row["within_tolerance"], **figures)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            yield damaged(f"a comparison in {where}", row, repr(error))


def _parity(chain: Chain, images: FoundImages, console: Console) -> Iterator[CheckedClaim]:
    """The file against each of its sources, on real, random and extreme images."""
    said = [row for where, report in chain.reports.items() for row in _reported(where, report)]
    recorded = [row for row in said if isinstance(row, ReportedRow)]
    yield from (row for row in said if isinstance(row, CheckedClaim))
    if (form := chain.nearest) is None:
        yield unchecked("the same answers as its sources", "", shown(chain.why_not, 160))
        return
    if chain.form is None:
        yield unchecked("the engine answers as its ONNX file", "", shown(chain.why_not, 160))
    sources = [source for source in chain.forms.values() if source is not form]
    real = images.first(max((row.num_images for row in recorded if row.images == "real"), default=NUM_REAL))
    sets = {"random": random_images(chain.spec.image), "extreme": extreme_images(chain.spec.image)}
    sets = sets if real is None else {"real": real, **sets}
    digests = {source.title: source.digest for source in (form, *sources)}
    pairs = [by_precision(form, source) for source in sources]
    again = compare_logits(pairs, sets, console) if pairs else []
    found = {
        (row.images, frozenset((digests[row.comparison.reference], digests[row.comparison.candidate]))): row
        for row in again
    }
    for key, row in found.items():
        claims = [claim for claim in recorded if claim.key == key]
        if claims or row.verdict is not None:  # nobody claims what a precision is not judged by
            yield _parity_row(row, claims)
    for claim in recorded:
        if claim.key not in found:
            missing = images.missing if claim.images == "real" and real is None else f"needs {claim.reference}"
            what = f"answers as {claim.reference}, {shown(claim.images)} images, in {claim.where}"
            yield unchecked(what, str(claim), missing)


def _parity_row(row: ParityRow, claims: list[ReportedRow]) -> CheckedClaim:
    result, limits, found = row.comparison, row.comparison.tolerance, row.comparison.difference
    candidate, reference = (Path(name).name for name in (result.candidate, result.reference))
    claim = f"{candidate} answers as {reference}, {result.num_images} {row.images} images"
    computed = f"{limits.shown(found)}, {100 * result.top1_agreement:.2f} % of {result.num_images}"
    if row.verdict is None:
        return unchecked(claim, str(claims[0]), f"{computed}; such images are not judged in this precision")
    near = [
        abs(said.relative - found.relative) <= limits.largest
        and abs(said.rms - found.rms) <= limits.rms
        and abs(said.top1_agreement - result.top1_agreement) <= 1 - limits.agreement
        and (said.num_images, said.within_tolerance) == (result.num_images, row.verdict)
        for said in claims
    ]
    recorded = str(claims[0]) if claims else f"within {limits}"
    return judged(claim, recorded, computed, is_same=bool(row.verdict) and all(near))


def _accuracy(chain: Chain, images: FoundImages, console: Console) -> Iterator[CheckedClaim]:
    accuracy, drop, cascade = map(chain.claims.get, ("training.test_accuracy", "export.test", f"export.{RECORD}"))
    if accuracy is None and not drop and not cascade:
        return
    form = exact = chain.nearest
    if form and TOLERANCES[form.precision].is_statistical:
        exact = chain.forms.get("plain.safetensors") or chain.forms.get("the checkpoint")
    missing = images.missing if images.part is None else chain.missing("plain.safetensors") if exact is None else ""
    wanted = {one.title: one.answer for one in (exact, form if drop or cascade else None) if one}
    answers: dict[str, np.ndarray] = {}
    targets = np.zeros(0, np.int64) if images.part is None else np.asarray(images.part.targets)
    if images.part is not None and wanted:
        try:
            with progress(console, "testing", len(targets)) as advance:
                answers = dict(zip(wanted, answer_part([*wanted.values()], images.part, advance), strict=True))
            if unread := len(targets) - len(next(iter(answers.values()))):
                answers, missing = {}, f"{unread} test images cannot be read"
        except Refusal as refusal:
            missing = shown(str(refusal), 160)
    before, after = (answers.get(one.title) if one else None for one in (exact, form))
    if accuracy is not None:
        yield _accuracy_row(accuracy, before, targets, exact, missing)
    if drop:
        yield from _drop(drop, form.precision if form else "int8", (before, after), targets, missing)
    if cascade:
        yield from _cascade(cascade, (before, after), missing)


def _accuracy_row(
    recorded: float, logits: np.ndarray | None, targets: np.ndarray, form: Artefact | None, missing: str
) -> CheckedClaim:
    """The same up to those images whose best two classes the precision's tolerance cannot tell apart."""
    claim, said = "test accuracy", f"{100 * recorded:.2f} %"
    if logits is None or form is None:
        return unchecked(claim, said, missing)
    num, right = len(targets), int((logits.argmax(1) == targets).sum())
    second = logits.copy()
    second[np.arange(num), logits.argmax(1)] = -np.inf
    tied = int(keeps_class(logits, second, tolerance=TOLERANCES[form.precision].largest).sum())
    found = f"{100 * right / num:.2f} % of {num:,} by {form.path.name}" + (f", {tied} nearly tied" if tied else "")
    return judged(claim, said, found, is_same=abs(recorded * num - right) <= tied + 0.5)


def _drop(
    recorded: dict[str, float], precision: str, logits: Logits, targets: np.ndarray, missing: str
) -> Iterator[CheckedClaim]:
    """What eight bits cost, figure by figure; shares of the images within the drop that they may cost."""
    before, after = logits
    again: dict[str, float] = {}
    if before is not None and after is not None:
        again = vars(measure_drop(before, after, targets))
    elif after is not None:
        again = {"num_images": len(targets), "accuracy": float((after.argmax(1) == targets).mean())}
    limits = {"num_images": 0.0, "relative_error": TOLERANCES[precision].rms}
    for name, value in recorded.items():
        claim, said = f"{precision} on test images: {shown(name.replace('_', ' '))}", f"{value:.5g}"
        found = f"{again[name]:.5g}" if name in again else None
        is_same = abs(value - again.get(name, value)) <= limits.get(name, ALLOWED_DROP)
        yield judged(claim, said, found, is_same=is_same, missing=missing)


def _cascade(recorded: Evidence, logits: Logits, missing: str) -> Iterator[CheckedClaim]:
    """With the recorded threshold: how many test images go on, and how many change their class all the same."""
    claim = f"cascade: threshold by {recorded.num_chosen_by:,} images"
    yield unchecked(claim, f"{recorded.threshold:.3g}", "export/cascade.py measures it again")
    before, after = logits
    counts = {} if before is None or after is None else count_changes(before, after, recorded.threshold)
    num_here = 0 if after is None else len(after)
    for name in ("num_escalated", "num_changed", "num_changed_alone"):
        num, found = getattr(recorded, name), counts.get(name, 0)
        claim, said = f"cascade: {name.removeprefix('num_').replace('_', ' ')}", f"{num} of {recorded.num_test:,}"
        most = recorded.changed_at_most * num_here if name == "num_changed" else num_here
        is_near = abs(num - found) <= ALLOWED_DROP * num_here and found <= most
        again = f"{found} of {num_here:,}" if counts else None
        yield judged(claim, said, again, is_same=is_near and recorded.num_test == num_here, missing=missing)
