"""What a file of this project claims about itself, parsed as untrusted input, and a claim that was checked."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from rich.console import Console

from common.difference import TOLERANCES as FOLD_TOLERANCES
from common.progress import make_table
from common.spec import DatasetName
from export.compare import TOLERANCES
from export.model_file.probe import NUM_IMAGES
from export.runtimes.cascade import RECORD, Evidence
from fold.lowerings import LOWERINGS
from fold.proof import ProofRow

Verdict = Literal["same", "differs", "cannot be checked here"]
MOST = 10**9  # images or numbers that a record may count
# The sections of a record, and why their other entries, which say how a file was made, are not checked.
MADE_HOW = {
    "training": "how a net was trained shows only when it is trained again",
    "fold": "says what was folded, and how",
    "export": "calibration, timing and choice are not repeated",
}


@dataclass(frozen=True)
class CheckedClaim:
    """One claim. If it cannot be checked, `computed` says what is missing."""

    claim: str
    recorded: str
    computed: str
    verdict: Verdict


def unchecked(claim: str, recorded: str, missing: str) -> CheckedClaim:
    return CheckedClaim(claim, recorded, missing, "cannot be checked here")


def judged(claim: str, recorded: str, computed: str | None, *, is_same: bool, missing: str = "") -> CheckedClaim:
    """`computed` is None if something is `missing` to compute it."""
    if computed is None:
        return unchecked(claim, recorded, missing)
    return CheckedClaim(claim, recorded, computed, "same" if is_same else "differs")


def compared(claim: str, recorded: Any, computed: Any, missing: str = "") -> CheckedClaim:
    """Two values that must be equal; `computed` as in `judged`."""
    text = None if computed is None else shown(str(computed))
    return judged(claim, shown(str(recorded)), text, is_same=recorded == computed, missing=missing)


def damaged(claim: str, value: Any, why: object) -> CheckedClaim:
    return judged(claim, shown(value), f"the record is damaged: {shown(str(why))}", is_same=False)


def print_claims(console: Console, rows: Sequence[CheckedClaim]) -> None:
    """A table, with the first digits of digests."""
    table = make_table("claim", "recorded", "computed here, or what is missing", "verdict")
    for row in rows:
        texts = (re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text) for text in (row.recorded, row.computed))
        table.add_row(row.claim, *texts, row.verdict.upper() if row.verdict == "differs" else row.verdict)
    console.print(table)


def shown(value: Any, most: int = 80) -> str:
    """A value of a record in at most `most` printable characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: 2 * most])
    return text if len(text) <= most else f"{text[: most - 3]}..."


@dataclass(frozen=True)
class Claims:
    """The record of training, fold and export."""

    values: dict[str, Any]  # by a key of `CHECKS`, as its check returns them
    damaged: tuple[CheckedClaim, ...]  # of the wrong type or impossible, and therefore no claim
    rest: dict[str, list[str]]  # section → names of the entries that no check knows

    def get(self, name: str) -> Any:
        """None if the file says nothing."""
        return self.values.get(name)


def read_claims(provenance: Mapping[str, Any], num_classes: int) -> Claims:
    """The claims of a provenance, whatever it holds."""
    checks = {**CHECKS, "export.probe": partial(_probe, num_classes=num_classes)}
    values: dict[str, Any] = {}
    faults: list[CheckedClaim] = []
    rest: dict[str, list[str]] = {}
    for section in MADE_HOW:
        record = provenance.get(section, {})
        if not isinstance(record, dict):
            faults.append(damaged(section, record, "it is not a JSON object"))
            continue
        for name, value in record.items():
            if (key := f"{section}.{name}") not in checks:
                rest.setdefault(section, []).append(shown(name))
                continue
            try:
                values[key] = checks[key](value)
            except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
                faults.append(damaged(key, value, error))
    return Claims(values, tuple(faults), rest)


def _check(is_right: Callable[[Any], object], why: str) -> Callable[[Any], Any]:
    """A function that returns a right value as it is, and raises ValueError with `why` for any other."""

    def check(value: Any) -> Any:
        if not is_right(value):
            raise ValueError(why)
        return value

    return check


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


_count = _check(lambda value: _is_number(value, int) and 0 <= value <= MOST, "it is not a whole number from 0 on")
_seed = _check(lambda value: _is_number(value, int) and 0 <= value < 2**64, "it is not the seed of random numbers")
_number = _check(_is_number, "it is not a finite number")
_share = _check(lambda value: _is_number(value) and 0 <= value <= 1, "it is not from 0 to 1")
_share_or_none = _check(lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "it is not from 0 to 1")
_text = _check(lambda value: isinstance(value, str), "it is not text")
_bool = _check(lambda value: isinstance(value, bool), "it is neither true nor false")
_sha256 = _check(lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value), "it is not a sha256")


def _one_of(known: Sequence[str]) -> Callable[[Any], str]:
    return _check(lambda value: value in known, f"it is not one of {', '.join(known)}")


def _split(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("it is not a JSON object")
    return {name: _sha256(part) if name == "sha256" else _count(part) for name, part in value.items()}


def _proof(rows: Any) -> list[ProofRow]:
    if not isinstance(rows, list):
        raise TypeError("it is not a list")
    checks = {"what": lambda value: shown(_text(value)), "images": _one_of(("random", "real"))}
    checks |= {"precision": _one_of(tuple(FOLD_TOLERANCES)), "num_images": _count, "top1_changes": _count}
    checks |= {"max_abs": _number, "relative": _number}
    return [ProofRow(**{name: check(row[name]) for name, check in checks.items()}) for row in rows]


def _probe(probe: Any, num_classes: int) -> tuple[int, np.ndarray]:
    """(seed, logits float64 [4, K])."""
    logits = np.array([[_number(value) for value in row] for row in probe["logits"]], np.float64)
    if logits.shape != (NUM_IMAGES, num_classes):
        raise ValueError(f"logits of shape {list(logits.shape)} instead of {[NUM_IMAGES, num_classes]}")
    return _seed(probe["seed"]), logits


def _drop(test: Any) -> dict[str, float]:
    """What eight bits cost, with the names of `Drop`."""
    checks = {"num_images": _count, "lost_low": _number, "lost_high": _number, "relative_error": _number}
    return {name: checks.get(name, _share)(value) for name, value in test.items()}


CHECKS: dict[str, Callable[[Any], Any]] = {
    "training.dataset": _one_of(get_args(DatasetName)),
    "training.split": _split,
    "training.validation": _share_or_none,
    "training.seed": _seed,
    "training.skip_unreadable": _bool,
    "training.test_accuracy": _share_or_none,
    "training.init_sha256": _sha256,
    "training.authors_sha256": _sha256,
    "fold.weights_sha256": lambda value: None if value is None else _sha256(value),  # of a net of your own
    "fold.checkpoint_sha256": _sha256,
    "fold.dirac_parameters": _count,
    "fold.convolutions": lambda pair: _count(pair[1]),  # of a graph, after the fold
    "fold.logits": _proof,
    "fold.layers": _proof,
    "export.plain_sha256": _sha256,
    "export.precision": _one_of(tuple(TOLERANCES)),
    "export.opset": _count,
    "export.lowering": _one_of(LOWERINGS),
    "export.cannot_saturate": _bool,
    "export.test": _drop,
    f"export.{RECORD}": Evidence.from_dict,
}
