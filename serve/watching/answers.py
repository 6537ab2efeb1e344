"""Counts of the model's answers, and their drift from the reference in its file."""

import logging
import threading
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from common.refusal import Refusal
from export.model_file.reference import EDGES, KEY, NUM_BINS, PARTS, Drift, Reference, drift, part, read_reference
from export.runtimes.runtime import Model
from serve.watching.shared_counts import Counts, buckets

WINDOW = 5_000  # images; drift is measured on the last one to two windows of each process
MOST_CLASSES = 128  # in /metrics, those predicted most often: about 25 kB
_KEPT = 2  # models: the current one, and the previous one for the next scrape
_NUM_IMAGES, _NOT_A_NUMBER, _SUM_TOP, _SUM_MARGIN, _HEAD = range(5)
_LAST = NUM_BINS - 1
_CARD_CLASSES = 10  # in GET /model
_LABEL_LENGTH = 80  # characters of a label in /metrics
_log = logging.getLogger(__name__)


class AnswerCounts:
    """The counts of one model: of all its answers, and as they were one and two windows ago."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.reference = reference_of(model)
        self._num_classes = len(model.spec.labels)
        self._size = _HEAD + self._num_classes + 2 * NUM_BINS
        self._counts = Counts(f"answers-{model.digest}", 3 * self._size)
        self._all, self._before, self._window = self._counts.own.reshape(3, self._size)
        self._view = self._all.data  # takes a third of the time to read and write
        self._lock = threading.Lock()  # each device has a thread

    def add(self, is_finite: np.ndarray, order: np.ndarray, ranked: np.ndarray) -> None:
        """Count a batch: which rows are finite, its best classes [N, ≥ 2] and their probabilities.

        A loop takes 1.2 µs for one image and 13 for 32; NumPy takes 7 for either, and most batches are small.
        """
        view, tops = self._view, _HEAD + self._num_classes
        margins = tops + NUM_BINS
        images = zip(is_finite.tolist(), order[:, 0].tolist(), ranked[:, :2].tolist(), strict=True)
        with self._lock:
            for counts, best, (top, second) in images:
                if not counts:
                    view[_NOT_A_NUMBER] += 1
                    continue
                margin = top - second
                view[_HEAD + best] += 1
                view[tops + min(bisect_left(EDGES, top), _LAST)] += 1
                view[margins + min(bisect_left(EDGES, margin), _LAST)] += 1
                view[_NUM_IMAGES] += 1
                view[_SUM_TOP] += top
                view[_SUM_MARGIN] += margin
            if view[_NUM_IMAGES] - self._window[_NUM_IMAGES] >= WINDOW:
                self._before[:], self._window[:] = self._window, self._all

    def totals(self) -> np.ndarray:
        """[_HEAD + K + 2 NUM_BINS], of all processes."""
        return self._counts.of_all().sum(0)[: self._size]

    def drifts(self) -> dict[str, Drift]:
        """The drift of the last windows of all processes; empty without answers or a reference."""
        totals, before, _ = self._counts.of_living().sum(0).reshape(3, self._size)
        recent = (totals - before)[_HEAD:]
        if self.reference is None or not part(recent, "margin").sum() > 0:
            return {}
        return {name: drift(part(recent, name), part(self.reference.counts, name)) for name in PARTS}


class Watch:
    """Call it with every batch. `collect` is for Prometheus, `summary` for GET /model."""

    def __init__(self) -> None:
        self._answers: dict[str, AnswerCounts] = {}  # by digest; the latest is last
        self._lock = threading.Lock()

    def __call__(self, model: Model, is_finite: np.ndarray, order: np.ndarray, ranked: np.ndarray) -> None:
        answers = self._answers.get(model.digest) or self.of(model)
        answers.add(is_finite, order, ranked)

    def of(self, model: Model) -> AnswerCounts:
        """The counts of `model`, which becomes the latest."""
        with self._lock:
            answers = self._answers.pop(model.digest, None) or AnswerCounts(model)
            self._answers = dict([*self._answers.items(), (model.digest, answers)][-_KEPT:])
            return answers

    def summary(self, model: Model) -> dict[str, Any]:
        """The counts of the model that answers, and the drift from its reference, if it has one."""
        answers = self.of(model)
        totals = answers.totals()
        num, labels = int(totals[_NUM_IMAGES]), model.spec.labels
        classes = part(totals[_HEAD:], "classes")
        shown = [
            {"label": labels[index], "index": index, "images": int(classes[index])}
            for index in _most_frequent(classes, _CARD_CLASSES)
            if classes[index]
        ]
        reference = answers.reference
        return {
            "answers": {
                "images": num,
                "not_a_number": int(totals[_NOT_A_NUMBER]),
                "mean_top_probability": float(totals[_SUM_TOP]) / num if num else None,
                "mean_margin": float(totals[_SUM_MARGIN]) / num if num else None,
                "most_frequent": shown,
            },
            "drift": reference
            and {
                "reference": {"what": reference.what, "images": reference.num_images, "of": reference.of},
                **{name: asdict(found) for name, found in answers.drifts().items()},
            },
        }

    def collect(self) -> Iterator[Metric]:
        """Each metric once, with the samples of all models."""
        families = {
            name: kind(f"diracnet_{name}", text, labels=labels.split())
            for name, (kind, labels, text) in _FAMILIES.items()
        }
        for answers in list(self._answers.values()):
            for name, labels, *values in _samples(answers):
                families[name].add_metric(labels, *values)
        yield from families.values()


_CLASSES = f"Images by predicted class; of more than {MOST_CLASSES} classes the most frequent"
_DRIFT = "Share of the latest images that differ from the model's reference"
_FAMILIES: dict[str, tuple[type[Any], str, str]] = {  # by name: the kind, its labels and its description
    "answered_images": (CounterMetricFamily, "digest", "Images that the model answered"),
    "not_a_number_images": (CounterMetricFamily, "digest", "Images whose logits are not finite"),
    "predicted_images": (CounterMetricFamily, "digest index label", _CLASSES),
    "top_probability": (HistogramMetricFamily, "digest", "Probability of the predicted class"),
    "margin": (HistogramMetricFamily, "digest", "Its difference from the probability of the second class"),
    "drift": (GaugeMetricFamily, "digest of", _DRIFT),
    "drift_chance": (GaugeMetricFamily, "digest of", "Drift that chance alone exceeds in 5 % of all cases"),
    "drift_images": (GaugeMetricFamily, "digest of", "Images that the drift is measured on"),
}


def _samples(answers: AnswerCounts) -> Iterator[tuple[Any, ...]]:
    """(name of its family, labels, value, or buckets and sum) of one model."""
    digest, labels, totals = answers.model.digest, answers.model.spec.labels, answers.totals()
    yield "answered_images", [digest], totals[_NUM_IMAGES]
    yield "not_a_number_images", [digest], totals[_NOT_A_NUMBER]
    classes = part(totals[_HEAD:], "classes")
    shown = _most_frequent(classes, MOST_CLASSES) if len(classes) > MOST_CLASSES else range(len(classes))
    for index in shown:
        yield "predicted_images", [digest, str(index), labels[index][:_LABEL_LENGTH]], classes[index]
    for name, total in (("top_probability", _SUM_TOP), ("margin", _SUM_MARGIN)):
        # The last bin includes what exceeds the last edge.
        yield name, [digest], buckets(EDGES, [*part(totals[_HEAD:], name), 0]), totals[total]
    for name, found in answers.drifts().items():
        yield "drift", [digest, name], found.value
        yield "drift_chance", [digest, name], found.chance
        yield "drift_images", [digest, name], found.num_images


def reference_of(model: Model) -> Reference | None:
    """The reference in the model's file; None if it is missing or not valid."""
    if KEY not in model.provenance:
        return None
    try:
        return read_reference(model.provenance[KEY], len(model.spec.labels))
    except Refusal as refusal:
        _log.warning("the drift of %s is not measured: %s", model.name, refusal)
        return None


def with_sound_reference(model: Model) -> Model:
    """`model` without a reference that is not valid, as GET /model shows all provenance."""
    if KEY not in model.provenance or reference_of(model):
        return model
    return replace(model, provenance={name: value for name, value in model.provenance.items() if name != KEY})


def _most_frequent(classes: np.ndarray, num: int) -> list[int]:
    """Indices in order of frequency, then of index."""
    return np.argsort(-classes, kind="stable")[:num].tolist()
