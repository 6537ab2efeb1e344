"""What a file of this project claims of itself, parsed as untrusted input, and a claim that was computed again."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from common.spec import DatasetName
from export.compare import TOLERANCES
from export.model_file.probe import NUM_IMAGES
from export.runtimes.cascade import RECORD, Evidence
from fold.lowerings import LOWERINGS

Verdict = Literal["same", "differs", "cannot be checked here"]
MOST = 10**9  # images or numbers that a record may count
# What is recorded beyond the claims below: how a file was made.
MADE_HOW = {
    "training": "how a net was trained shows only when it is trained again",
    "fold": "says what was folded, and how",
    "export": "calibration, timing and choice are not repeated",
}


@dataclass(frozen=True)
class CheckedClaim:
    """One claim. Where it cannot be checked, `computed` says what is missing."""

    claim: str
    recorded: str
    computed: str
    verdict: Verdict


def judged(claim: str, recorded: str, computed: str, *, is_same: bool) -> CheckedClaim:
    return CheckedClaim(claim, recorded, computed, "same" if is_same else "differs")


def compared(claim: str, recorded: Any, computed: Any) -> CheckedClaim:
    """Of two values that are the same or are not."""
    return judged(claim, shown(str(recorded)), shown(str(computed)), is_same=recorded == computed)


def unchecked(claim: str, recorded: str, missing: str) -> CheckedClaim:
    return CheckedClaim(claim, recorded, missing, "cannot be checked here")


def shown(value: Any, most: int = 80) -> str:
    """A value of a record in at most so many printable letters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: 2 * most])
    return text if len(text) <= most else f"{text[: most - 3]}..."


@dataclass(frozen=True)
class Measured:
    """A row of the fold's proof, as recorded."""

    what: str
    images: str
    precision: str
    num_images: int
    relative: float
    top1_changes: int


@dataclass(frozen=True)
class Claims:
    """The record of training, fold and export; None and () where a file says nothing."""

    training: dict[str, Any]  # what names the images: dataset, split, validation, seed, ...
    test_accuracy: float | None
    checkpoint_sha256: str | None
    plain_sha256: str | None
    others_sha256: dict[str, str]  # of what else was read: the weights of an own net, the authors' file, --init's
    dirac_parameters: int | None
    convolutions: int | None  # of a graph, after the fold
    proof: tuple[Measured, ...]  # logits and layers
    precision: str | None
    opset: int | None
    lowering: str | None
    cannot_saturate: bool | None
    probe: tuple[int, np.ndarray] | None  # seed, logits [4, K]
    test: dict[str, float]  # what eight bits cost, as `Drop` has it
    cascade: dict[str, float]  # from which gap on eight bits are believed, as `Evidence` has it
    damaged: tuple[CheckedClaim, ...]
    rest: tuple[tuple[str, str, str], ...]  # (section, name, value) of what is not checked by any of the above


def read_claims(provenance: Mapping[str, Any], num_classes: int) -> Claims:
    """The claims of a provenance. What is of the wrong type or impossible is among `damaged`, and is no claim."""
    record = _Record(provenance)
    take = record.take
    training = {name: take("training", name, check) for name, check in _OF_IMAGES.items()}
    sources = (("training", "init"), ("training", "authors"), ("fold", "weights"))
    others = {f"{section}.{name}_sha256": take(section, f"{name}_sha256", _sha256) for section, name in sources}
    return Claims(
        training={name: value for name, value in training.items() if value is not None},
        test_accuracy=take("training", "test_accuracy", _optional(_share)),
        checkpoint_sha256=take("fold", "checkpoint_sha256", _sha256),
        plain_sha256=take("export", "plain_sha256", _sha256),
        others_sha256={name: digest for name, digest in others.items() if digest},
        dirac_parameters=take("fold", "dirac_parameters", _count),
        convolutions=take("fold", "convolutions", lambda pair: _count(pair[1])),
        proof=(take("fold", "logits", _measured) or ()) + (take("fold", "layers", _measured) or ()),
        precision=take("export", "precision", _one_of(tuple(TOLERANCES))),
        opset=take("export", "opset", _count),
        lowering=take("export", "lowering", _one_of(LOWERINGS)),
        cannot_saturate=take("export", "cannot_saturate", _bool),
        probe=take("export", "probe", lambda probe: _probe(probe, num_classes)),
        test=take("export", "test", _drop) or {},
        cascade=take("export", RECORD, _cascade) or {},
        damaged=tuple(record.damaged),
        rest=tuple(record.rest()),
    )


class _Record:
    """A provenance; what has been taken from it, and what could not be."""

    def __init__(self, provenance: Mapping[str, Any]) -> None:
        self.damaged: list[CheckedClaim] = []
        self._sections: dict[str, dict[str, Any]] = {}
        self._taken: set[tuple[str, str]] = set()
        for name in MADE_HOW:
            section = provenance.get(name, {})
            if not isinstance(section, dict):
                self._damage(name, section, "it is not a JSON object")
            self._sections[name] = section if isinstance(section, dict) else {}

    def take(self, section: str, name: str, check: Callable[[Any], Any]) -> Any:
        """The value as `check` reads it; None where it is not there, or `check` objects."""
        self._taken.add((section, name))
        if name not in self._sections[section]:
            return None
        value = self._sections[section][name]
        try:
            return check(value)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            self._damage(f"{section}.{name}", value, str(error))
            return None

    def rest(self) -> list[tuple[str, str, str]]:
        return [
            (section, shown(name), shown(value))
            for section, values in self._sections.items()
            for name, value in values.items()
            if (section, name) not in self._taken
        ]

    def _damage(self, claim: str, value: Any, why: str) -> None:
        self.damaged.append(judged(claim, shown(value), f"the record is damaged: {shown(why)}", is_same=False))


def _check(is_right: Callable[[Any], bool], why: str) -> Callable[[Any], Any]:
    """Gives a value as it is; a ValueError that says `why` for one that is not right."""

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
_text = _check(lambda value: isinstance(value, str), "it is not text")
_bool = _check(lambda value: isinstance(value, bool), "it is neither true nor false")
_sha256 = _check(
    lambda value: isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"),
    "it is not a sha256",
)


def _one_of(known: tuple[str, ...]) -> Callable[[Any], str]:
    return _check(lambda value: value in known, f"it is not one of {', '.join(known)}")


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _split(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("it is not a JSON object")
    return {name: _sha256(part) if name == "sha256" else _count(part) for name, part in value.items()}


def _measured(rows: Any) -> tuple[Measured, ...]:
    if not isinstance(rows, list):
        raise TypeError("it is not a list")
    return tuple(
        Measured(
            what=shown(_text(row["what"])),
            images=_one_of(("random", "real"))(row["images"]),
            precision=_one_of(("float64", "float32"))(row["precision"]),
            num_images=_count(row["num_images"]),
            relative=_number(row["relative"]),
            top1_changes=_count(row["top1_changes"]),
        )
        for row in rows
    )


def _probe(probe: Any, num_classes: int) -> tuple[int, np.ndarray]:
    logits = np.array([[_number(value) for value in row] for row in probe["logits"]], np.float64)
    if logits.shape != (NUM_IMAGES, num_classes):
        raise ValueError(f"logits of shape {list(logits.shape)} instead of {[NUM_IMAGES, num_classes]}")
    return _seed(probe["seed"]), logits


def _drop(test: Any) -> dict[str, float]:
    checks = {"num_images": _count, "lost_low": _number, "lost_high": _number, "relative_error": _number}
    return {name: checks.get(name, _share)(value) for name, value in test.items()}


def _cascade(record: Any) -> dict[str, float]:
    checks = {"threshold": _number, "changed_at_most": _share}
    return {field.name: checks.get(field.name, _count)(record[field.name]) for field in fields(Evidence)}


_OF_IMAGES: dict[str, Callable[[Any], Any]] = {
    "dataset": _one_of(get_args(DatasetName)),
    "split": _split,
    "validation": _optional(_share),
    "seed": _seed,
    "skip_unreadable": _bool,
}
