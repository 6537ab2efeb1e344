"""A runtime of two files of one net: int8 answers, and images whose class it leaves in doubt go on to float32."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from common.documents import wrong_fields
from common.files import read_whole, sha256
from common.refusal import Refusal, one_line
from export.model_file.onnx_reader import Header, digest_of, read_header
from export.runtimes.runtime import Model, Runtime
from export.runtimes.saturation import warning

QUICK, EXACT = "int8", "fp32"
RECORD = "cascade"  # its key in the record of the export


@dataclass(frozen=True)
class Evidence:
    """The gap above which int8 is trusted, and how well that worked; export/eight_bits/escalation.py measures it.

    A class has changed if it is not float32's.
    """

    threshold: float  # of the gap, as logits count: the largest error of `num_chosen_by` images
    num_chosen_by: int
    num_test: int  # test images, none of which chose the threshold
    num_escalated: int  # of these, went on to float32
    num_changed: int  # have another class in the cascade
    num_changed_alone: int  # have another class in int8 alone
    changed_at_most: float  # share of changed classes among images like the test images, with 95 % certainty

    @classmethod
    def from_dict(cls, record: Any) -> "Evidence":
        """The inverse of `to_dict`; a damaged record raises TypeError, KeyError, ValueError or OverflowError."""
        kinds = {field.name: field.type for field in fields(cls)}
        values = {name: record[name] for name in kinds}
        if wrong := wrong_fields(values, kinds):
            raise ValueError("; ".join(wrong))
        found = cls(**{**values, "threshold": float(values["threshold"])})
        counts = [found.num_escalated, found.num_changed, found.num_changed_alone]
        if not (isfinite(found.threshold) and found.threshold >= 0 and 0 <= found.changed_at_most <= 1):
            raise ValueError(f"threshold {found.threshold}, changed_at_most {found.changed_at_most}")
        if min(found.num_chosen_by, found.num_test) < 1 or min(counts) < 0 or max(counts) > found.num_test:
            raise ValueError(f"counts {counts} of {found.num_test} test images, {found.num_chosen_by} to choose by")
        return found

    @property
    def share_escalated(self) -> float:
        return self.num_escalated / self.num_test

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share_escalated": self.share_escalated}

    def __str__(self) -> str:
        return (
            f"{EXACT} answers where the two largest logits of {QUICK} lie within {self.threshold:.3g}, "
            f"{100 * self.share_escalated:.2g} % of {self.num_test:,} test images; of these {self.num_changed} "
            f"have another class than in {EXACT} ({self.num_changed_alone} in {QUICK} alone), "
            f"with 95 % certainty at most {100 * self.changed_at_most:.2g} %"
        )


@dataclass(frozen=True)
class CascadeFiles:
    """The two files of a cascade, checked to be of one net."""

    quick: Path
    exact: Path
    digests: tuple[str, str]
    evidence: Evidence

    def __str__(self) -> str:
        files = zip((self.quick, self.exact), self.digests, strict=True)
        return f"{', then '.join(f'{path.name} ({digest[:12]})' for path, digest in files)}: {self.evidence}"


class Cascade:
    """Two forms of one net; `model` and `description` as in `Runtime`. It counts what it answers."""

    def __init__(self, quick: Runtime, exact: Runtime, evidence: Evidence) -> None:
        self.quick, self.exact, self.evidence = quick, exact, evidence
        self.model = _model(quick.model, exact.model, evidence)
        self.platform, self.library = quick.platform, quick.library
        self.description = f"{quick.description}, a cascade of {QUICK} and {EXACT}"
        self.num_images = self.num_escalated = 0
        self.num_last = self.num_escalated_last = 0  # of the latest call

    def __call__(self, images: np.ndarray) -> np.ndarray:
        logits = self.quick(images)
        rows = np.flatnonzero(in_doubt(logits, self.evidence.threshold))
        if len(rows):
            logits = logits.copy()
            logits[rows] = self.exact(images[rows])
        self.num_last, self.num_escalated_last = len(images), len(rows)
        self.num_images += self.num_last
        self.num_escalated += self.num_escalated_last
        return logits

    @property
    def counted(self) -> str:
        """For people: how many images have gone on to float32."""
        share = 100 * self.num_escalated / max(1, self.num_images)
        return f"{self.num_escalated:,} of {self.num_images:,} images ({share:.1f} %) went on to {EXACT}"


def in_doubt(logits: np.ndarray, threshold: float) -> np.ndarray:
    """bool [N]: rows of [N, K] whose two largest logits lie within `threshold`, or that are not numbers.

    Let eight bits favour their class over any other by at most e more than float32 does. Where that class leads by
    more than e, it leads in float32 too; a lead of e itself may be a tie there.
    """
    return ~(np.isfinite(logits).all(axis=1) & (gaps(logits) > threshold))


def gaps(logits: np.ndarray) -> np.ndarray:
    """float64 [N]: between the two largest of each row [N, K]; infinite if there is one class, which is sure."""
    if logits.shape[1] == 1:
        return np.full(len(logits), np.inf)
    two = np.partition(logits.astype(np.float64), -2, axis=1)[:, -2:]
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, hence in doubt
        return two[:, 1] - two[:, 0]


def read_forms(paths: Sequence[Path]) -> CascadeFiles:
    """The files of a cascade in any order; refuses any but two forms of one net with evidence that holds here."""
    quick, exact = in_order(paths)
    content = read_whole(quick)
    evidence = _read_evidence(quick, exact, read_header(quick, content))
    if doubt := warning(quick, content):
        raise Refusal(f"{doubt}; the evidence for its cascade does not hold here")
    return CascadeFiles(quick, exact, (digest_of(quick, content), digest_of(exact, read_whole(exact))), evidence)


def in_order(paths: Sequence[Path]) -> tuple[Path, Path]:
    """(int8, float32), by the records in the files; refuses any but two forms of one net."""
    both = f"the {EXACT} and the {QUICK} form of one net"
    if len(paths) != 2:
        raise Refusal(f"a cascade takes two files, {both}, as in plain.onnx plain-int8.onnx; got {len(paths)}")
    if others := [path for path in paths if path.suffix != ".onnx"]:
        where = "a cascade runs only in ONNX Runtime, where its threshold was measured"
        raise Refusal(f"{others[0]} is not an .onnx file; {where}: name two .onnx files")
    again = "export both from one plain.safetensors with export/to_onnx.py"
    headers = [read_header(path, read_whole(path)) for path in paths]
    kinds = [str(_export(header).get("precision", "of no recorded precision")) for header in headers]
    if {*kinds} != {QUICK, EXACT}:
        found = " and ".join(f"{path} is {kind[:40]}" for path, kind in zip(paths, kinds, strict=True))
        raise Refusal(f"a cascade takes {both}, and {found}; {again}")
    quick, exact = paths if kinds == [QUICK, EXACT] else reversed(paths)
    net, other = ((header.spec, _export(header).get("plain_sha256")) for header in headers)
    if net != other or net[1] is None:
        raise Refusal(
            f"{quick} and {exact} are not of one net, by the spec and the plain net's digest in them; {again}"
        )
    return quick, exact


def _read_evidence(quick: Path, exact: Path, header: Header) -> Evidence:
    how = f"measure it with python export/cascade.py {exact} {quick}"
    record = _export(header).get(RECORD)
    if record is None:
        raise Refusal(f"{quick} does not record the gap above which its classes are {EXACT}'s; {how}")
    try:
        return Evidence.from_dict(record)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise Refusal(f"the record of the cascade in {quick} is damaged ({one_line(error, 120)}); {how}") from error


def _export(header: Header) -> dict[str, Any]:
    return header.provenance.get("export", {})


def _model(quick: Model, exact: Model, evidence: Evidence) -> Model:
    """The description of both: int8's record, with a digest that depends on both files."""
    forms = [
        {"precision": precision, "name": model.name, "digest": model.digest, "file_bytes": model.num_bytes}
        for precision, model in ((QUICK, quick), (EXACT, exact))
    ]
    export = {name: part for name, part in quick.provenance.get("export", {}).items() if name != "probe"}
    export |= _probe(quick, exact, evidence.threshold)
    record = {"forms": forms, **evidence.to_dict()}
    return replace(
        quick,
        digest=sha256((quick.digest + exact.digest).encode()),
        provenance={**exact.provenance, **quick.provenance, "export": export, RECORD: record},
        num_bytes=quick.num_bytes + exact.num_bytes,
    )


def _probe(quick: Model, exact: Model, threshold: float) -> dict[str, Any]:
    """The cascade's answers to the probe images, by the records of both forms; none if one has no valid record."""
    try:
        first, second = (model.provenance["export"]["probe"] for model in (quick, exact))
        logits, others = (np.array(record["logits"], np.float64) for record in (first, second))
        if first["seed"] != second["seed"] or logits.shape != others.shape:
            return {}
        answers = np.where(in_doubt(logits, threshold)[:, None], others, logits)
        return {"probe": {**first, "logits": answers.tolist()}}
    except (TypeError, KeyError, ValueError, IndexError):
        return {}
