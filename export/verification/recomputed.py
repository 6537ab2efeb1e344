"""Claims about many images: the fold's proof, parity, test accuracy, and what eight bits lose."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from common.difference import keeps_class
from common.progress import progress
from common.refusal import Refusal
from export import parity
from export.artefacts import Artefact
from export.compare import ALLOWED_DROP, TOLERANCES, Comparison, answer_part
from export.eight_bits.quantize import measure_drop
from export.runtimes.cascade import in_doubt
from export.verification.chain import Chain
from export.verification.claims import CheckedClaim, Claims, Measured, judged, shown, unchecked
from fold.image_sets import NUM_RANDOM, extreme_images, random_images
from fold.plain import fold_net
from fold.proof import TOLERANCES as FOLD_TOLERANCES
from fold.proof import ProofRow, prove
from train.checkpoint import load_checkpoint, load_net
from train.data import datasets
from train.data.folder import Changed, Unlike

NUM_REAL = 500  # as fold/run.py and export/parity.py take where nobody says otherwise
MOST_REAL = 10_000
MOST_PIXEL_BYTES = 2**28  # of the random images of one comparison


@dataclass(frozen=True)
class Images:
    """Those that a model was trained and tested on, or why they are not at hand."""

    test: datasets.Part | None
    missing: str
    rows: tuple[CheckedClaim, ...]  # what is claimed of the images themselves

    def first(self, num: int) -> np.ndarray | None:
        return self.test.first(num) if self.test is not None and num else None


def find_images(chain: Chain, data_dir: Path | None) -> Images:
    """The data set that the record of the training names, divided as it says."""
    training = dict(chain.claims.training)
    if checkpoint := chain.forms.get("the checkpoint"):  # it knows where the data set lay
        data_folder = load_checkpoint(checkpoint.path).config.get("data_dir")
        training["data_dir"] = data_folder if isinstance(data_folder, str) else None
    if "dataset" not in training:
        if data_dir:
            raise Refusal(f"{chain.path} does not record what it was trained on: leave --data-dir out")
        return Images(None, "no record says what the net was trained on", ())
    recorded = training.get("split", {})
    claim, said = "images of training, validation and test", f"sha256 {recorded.get('sha256', '')}"
    load = partial(datasets.load_as_trained, training, data_dir=data_dir, image=chain.spec.image)
    try:
        dataset = load(beside=chain.path.parent)
    except (Changed, Unlike) as refusal:
        return Images(None, str(refusal), (judged(claim, said, shown(str(refusal), 160), is_same=False),))
    except Refusal as refusal:
        if data_dir:
            raise
        return Images(None, str(refusal), (unchecked(claim, said, shown(str(refusal), 160)),) if recorded else ())
    rows = (judged(claim, said, said, is_same=True),) if recorded else ()
    if dataset.info.labels != chain.spec.labels:
        why = f"the classes there are {', '.join(dataset.info.labels[:5])}"
        return Images(
            None, why, (*rows, judged("labels", shown(", ".join(chain.spec.labels)), shown(why), is_same=False))
        )
    return Images(dataset.test, "", rows)


def check_images(chain: Chain, images: Images, console: Console) -> Iterator[CheckedClaim]:
    """All claims about images, those of the data set first."""
    yield from images.rows
    image = chain.spec.image
    if NUM_RANDOM * image.height * image.width * image.channels > MOST_PIXEL_BYTES:
        what = f"{NUM_RANDOM} images of {image.height}x{image.width}"
        yield unchecked("fold, parity and accuracy", "", f"{what} take more memory than a check may")
        return
    yield from _proof(chain, images, console)
    yield from _parity(chain, images, console)
    yield from _accuracy(chain, images, console)


def _proof(chain: Chain, images: Images, console: Console) -> Iterator[CheckedClaim]:
    """The fold is made and proven again from the checkpoint; the logits one by one, of the layers the worst."""
    recorded, checkpoint = chain.claims.proof, chain.forms.get("the checkpoint")
    if not recorded:
        return
    sets = _proof_images(chain, images) if checkpoint else {}
    again_all: list[ProofRow] = []
    if checkpoint and sets:
        net = load_net(load_checkpoint(checkpoint.path))
        with progress(console, "proving the fold again", 2 * sum(map(len, sets.values()))) as advance:
            proof = prove(net, fold_net(net), sets, advance=advance)
        again_all = [*proof.ends, *proof.layers]
    missing = images.missing if checkpoint else chain.missing("the checkpoint")
    for key in dict.fromkeys(map(_column, recorded)):
        again = [row for row in again_all if _column(row) == key]
        yield _proof_row([row for row in recorded if _column(row) == key], again, missing)


def _column(row: Measured | ProofRow) -> tuple[bool, str, str]:
    """Logits or layers, in one precision on one kind of images."""
    return row.what == "logits", row.precision, row.images


def _proof_images(chain: Chain, images: Images) -> dict[str, torch.Tensor]:
    """As many of each kind as the record says, where they are at hand."""
    num = {
        kind: max((row.num_images for row in chain.claims.proof if row.images == kind), default=0)
        for kind in ("random", "real")
    }
    sets = {
        "random": random_images(chain.spec.image, min(num["random"], NUM_RANDOM)) if num["random"] else None,
        "real": images.first(min(num["real"], MOST_REAL)),
    }
    return {kind: torch.as_tensor(some) for kind, some in sets.items() if some is not None}


def _proof_row(recorded: list[Measured], again: list[ProofRow], missing: str) -> CheckedClaim:
    first, worst = recorded[0], max(recorded, key=lambda row: row.relative)
    what = "logits" if first.what == "logits" else f"{len(recorded)} layers"
    claim = f"fold: {what}, {first.precision}, {first.images} images"
    if not again:
        return unchecked(claim, _figure(worst), missing)
    by_name = {row.what: row for row in again}
    limit = FOLD_TOLERANCES[first.precision]
    wrong = [row for row in recorded if not _is_near(row, by_name.get(row.what), limit)]
    shown_row = wrong[0] if wrong else worst
    there = by_name.get(shown_row.what)
    found = _figure(there) if there else f"there is no layer {shown_row.what}"
    return judged(claim, _figure(shown_row), found, is_same=not wrong)


def _is_near(recorded: Measured, there: ProofRow | None, limit: float) -> bool:
    """Roundings differ from machine to machine; by less than what a fold may be wrong by."""
    if there is None or not abs(recorded.relative - there.relative) <= limit:
        return False
    counts = (recorded.num_images, recorded.top1_changes) == (there.num_images, there.top1_changes)
    return recorded.what != "logits" or (counts and there.relative <= limit)


def _figure(row: Measured | ProofRow) -> str:
    if row.what != "logits":
        return f"{row.what} {row.relative:.1e}, {row.num_images} images"
    return f"{row.relative:.1e}, {row.top1_changes} of {row.num_images} classes changed"


def _parity(chain: Chain, images: Images, console: Console) -> Iterator[CheckedClaim]:
    """The file against each that it was made of, on real, random and extreme images."""
    said = [row for where, report in chain.reports for row in _reported(where, report)]
    recorded = [row for row in said if isinstance(row, Reported)]
    yield from (row for row in said if isinstance(row, CheckedClaim))
    form = chain.nearest
    if form is None:
        yield unchecked("the same answers as its sources", "", shown(chain.why_not, 160))
        return
    if chain.form is None:
        yield unchecked("the engine answers as its ONNX file", "", shown(chain.why_not, 160))
    sources = [source for source in chain.forms.values() if source is not form]
    num = max((row.num for row in recorded if row.images == "real"), default=NUM_REAL)
    real = images.first(min(num, MOST_REAL))
    sets = {"random": random_images(chain.spec.image), "extreme": extreme_images(chain.spec.image)}
    sets = sets if real is None else {"real": real, **sets}
    digests = {source.name: source.digest for source in (form, *sources)}
    done: set[tuple[str, ...]] = set()
    pairs = [parity.by_precision(form, source) for source in sources]
    for row in parity.compare_logits(pairs, sets, console) if pairs else ():
        key = _key(row.images, digests[row.comparison.reference], digests[row.comparison.candidate])
        done.add(key)
        claims = [claim for claim in recorded if claim.key == key]
        if claims or row.verdict is not None:  # nobody claims what a precision is not judged by
            yield _parity_row(row, claims)
    for claim in recorded:
        if claim.key not in done:
            missing = images.missing if claim.images == "real" and real is None else f"needs {claim.reference}"
            what = f"answers as {claim.reference}, {shown(claim.images)} images, in {claim.where}"
            yield unchecked(what, str(claim), missing)


@dataclass(frozen=True)
class Reported:
    """A comparison in a report of export/parity.py, with the digests of both files."""

    where: str
    reference: str
    images: str
    key: tuple[str, ...]
    num: int
    relative: float
    rms: float
    agreement: float
    is_within: bool | None

    def __str__(self) -> str:
        return f"{self.relative:.1e}, {100 * self.agreement:.2f} % of {self.num}"


def _reported(where: str, report: dict[str, Any]) -> Iterator[Reported | CheckedClaim]:
    """The comparisons of a report; of one that is damaged what is to be said of it."""
    digests = report["artefacts"]
    for row in report["parity"]:
        try:
            reference, candidate = (str(row[side]).partition(" on ")[0] for side in ("reference", "candidate"))
            yield Reported(
                where=where,
                reference=shown(Path(reference).name),
                images=str(row["images"]),
                key=_key(str(row["images"]), str(digests[reference]), str(digests[candidate])),
                num=int(row["num_images"]),
                relative=float(row["relative"]),
                rms=float(row["rms"]),
                agreement=float(row["top1_agreement"]),
                is_within=row["within_tolerance"],
            )
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            why = f"the record is damaged: {shown(repr(error))}"
            yield judged(f"a comparison in {where}", shown(row), why, is_same=False)


def _key(images: str, first: str, second: str) -> tuple[str, ...]:
    """Of a comparison of two files, whichever of them is the reference."""
    return images, *sorted((first, second))


def _parity_row(row: parity.ParityRow, claims: list[Reported]) -> CheckedClaim:
    result: Comparison = row.comparison
    limits, found = result.tolerance, result.difference
    candidate, reference = (Path(name).name for name in (result.candidate, result.reference))
    claim = f"{candidate} answers as {reference}, {result.num_images} {row.images} images"
    figure = f"rms {found.rms:.1e}" if limits.is_statistical else f"{found.relative:.1e}"
    computed = f"{figure}, {100 * result.top1_agreement:.2f} % of {result.num_images}"
    if row.verdict is None:
        return unchecked(claim, str(claims[0]), f"{computed}; such images are not judged in this precision")
    near = [
        abs(said.relative - found.relative) <= limits.largest
        and abs(said.rms - found.rms) <= limits.rms
        and abs(said.agreement - result.top1_agreement) <= 1 - limits.agreement
        and said.num == result.num_images
        and said.is_within == row.verdict
        for said in claims
    ]
    recorded = str(claims[0]) if claims else f"within {limits}"
    return judged(claim, recorded, computed, is_same=bool(row.verdict) and all(near))


def _accuracy(chain: Chain, images: Images, console: Console) -> Iterator[CheckedClaim]:
    """Test accuracy, and what eight bits cost on the same images."""
    claims, form = chain.claims, chain.nearest
    if claims.test_accuracy is None and not claims.test and not claims.cascade:
        return
    is_coarse = form is not None and TOLERANCES[form.precision].is_statistical
    exact = (
        form if form and not is_coarse else chain.forms.get("plain.safetensors") or chain.forms.get("the checkpoint")
    )
    missing = images.missing if images.test is None else chain.missing("plain.safetensors") if exact is None else ""
    wanted = [one for one in (exact, form if claims.test or claims.cascade else None) if one]
    logits, targets = {}, np.zeros(0, np.int64)
    if images.test is not None and wanted:
        try:
            logits, targets = _answers(wanted, images.test, console)
        except Refusal as refusal:
            missing = shown(str(refusal), 160)
    if claims.test_accuracy is not None:
        claim, recorded = "test accuracy", f"{100 * claims.test_accuracy:.2f} %"
        if exact and exact.name in logits:
            yield _accuracy_row(claim, claims.test_accuracy, logits[exact.name], targets, exact)
        else:
            yield unchecked(claim, recorded, missing)
    both = (logits.get(exact.name) if exact else None, logits.get(form.name) if form else None)
    if claims.test:
        yield from _drop(claims, form.precision if form else "int8", both, targets, missing)
    if claims.cascade:
        yield from _cascade(claims.cascade, both, missing)


def _answers(forms: list[Artefact], test: datasets.Part, console: Console) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Logits [N, K] of each form by its name, and targets [N]; a piece of the images in memory at a time."""
    with progress(console, "testing", len(test)) as advance:
        logits = answer_part([form.answer for form in forms], test, advance)
    if missing := len(test) - len(logits[0]):
        raise Refusal(f"{missing} test images cannot be read")
    return dict(zip((form.name for form in forms), logits, strict=True)), np.asarray(test.targets)


def _accuracy_row(claim: str, recorded: float, logits: np.ndarray, targets: np.ndarray, form: Artefact) -> CheckedClaim:
    """The same up to those images whose best two classes the precision's tolerance cannot tell apart."""
    num, right = len(targets), int((logits.argmax(1) == targets).sum())
    said = f"{100 * recorded:.2f} %"
    second = logits.copy()
    second[np.arange(num), logits.argmax(1)] = -np.inf
    tied = int(keeps_class(logits, second, tolerance=TOLERANCES[form.precision].largest).sum())
    found = f"{100 * right / num:.2f} % of {num:,} by {form.path.name}" + (f", {tied} nearly tied" if tied else "")
    return judged(claim, said, found, is_same=abs(recorded * num - right) <= tied + 0.5)


def _drop(
    claims: Claims, precision: str, logits: tuple[np.ndarray | None, np.ndarray | None], targets: np.ndarray, why: str
) -> Iterator[CheckedClaim]:
    """What eight bits cost, figure by figure; shares of the images within the drop that they may cost."""
    before, after = logits
    again: dict[str, float] = {}
    if before is not None and after is not None:
        again = {name: float(value) for name, value in vars(measure_drop(before, after, targets)).items()}
    elif after is not None:
        again = {"num_images": float(len(targets)), "accuracy": float((after.argmax(1) == targets).mean())}
    limits = {"num_images": 0.0, "relative_error": TOLERANCES[precision].rms}
    for name, recorded in claims.test.items():
        claim = f"{precision} on test images: {shown(name.replace('_', ' '))}"
        if name in again:
            is_same = abs(recorded - again[name]) <= limits.get(name, ALLOWED_DROP)
            yield judged(claim, f"{recorded:.5g}", f"{again[name]:.5g}", is_same=is_same)
        else:
            yield unchecked(claim, f"{recorded:.5g}", why)


def _cascade(
    recorded: dict[str, float], logits: tuple[np.ndarray | None, np.ndarray | None], why: str
) -> Iterator[CheckedClaim]:
    """With the recorded threshold: how many test images go on, and how many change their class all the same."""
    claim = "cascade: threshold by {:,.0f} images".format(recorded["num_chosen_by"])
    yield unchecked(claim, f"{recorded['threshold']:.3g}", "export/cascade.py measures it again")
    before, after = logits
    num, bound = recorded["num_test"], recorded["changed_at_most"]
    for name in ("num_escalated", "num_changed", "num_changed_alone"):
        claim, said = f"cascade: {name.removeprefix('num_').replace('_', ' ')}", f"{recorded[name]:.0f} of {num:,.0f}"
        if before is None or after is None:
            yield unchecked(claim, said, why)
            continue
        doubtful = in_doubt(after, recorded["threshold"])
        changed = before.argmax(1) != after.argmax(1)
        found = {"num_escalated": doubtful, "num_changed": changed & ~doubtful, "num_changed_alone": changed}[
            name
        ].sum()
        near = abs(recorded[name] - found) <= ALLOWED_DROP * len(after) and num == len(after)
        is_same = near and (name != "num_changed" or found <= bound * len(after))
        yield judged(claim, said, f"{found} of {len(after):,}", is_same=bool(is_same))
