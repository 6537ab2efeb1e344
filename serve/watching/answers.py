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
from serve.watching.shared_counts import Counts

WINDOW = 5_000  # images; drift is measured on the last one to two windows of each process
MOST_CLASSES = 128  # in /metrics, those predicted most often: about 25 kB
_KEPT = 2  # models: the current one, and the previous one for the next scrape
_NUM_IMAGES, _NOT_A_NUMBER, _SUM_TOP, _SUM_MARGIN, _HEAD = range(5)
_LAST = NUM_BINS - 1
_CARD_CLASSES = 10  # in GET /model
_LABEL_LENGTH = 80  # characters of a label in /metrics
_log = logging.getLogger(__name__)


class Answers:
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
    """Call it with every batch. `collect` is for Prometheus, `card` for GET /model."""

    def __init__(self) -> None:
        self._answers: dict[str, Answers] = {}  # by digest; the latest is last
        self._lock = threading.Lock()

    def __call__(self, model: Model, is_finite: np.ndarray, order: np.ndarray, ranked: np.ndarray) -> None:
        answers = self._answers.get(model.digest) or self.of(model)
        answers.add(is_finite, order, ranked)

    def of(self, model: Model) -> Answers:
        """The counts of `model`, which becomes the latest."""
        with self._lock:
            answers = self._answers.pop(model.digest, None) or Answers(model)
            self._answers = dict([*self._answers.items(), (model.digest, answers)][-_KEPT:])
            return answers

    def card(self, model: Model) -> dict[str, Any]:
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
        families = _families()
        for answers in list(self._answers.values()):
            _add_counts(families, answers)
            for name, found in answers.drifts().items():
                labels = [answers.model.digest, name]
                families["drift"].add_metric(labels, found.value)
                families["chance"].add_metric(labels, found.chance)
                families["window"].add_metric(labels, found.num_images)
        yield from families.values()


def _families() -> dict[str, Any]:
    of_model, of_part = ("digest",), ("digest", "of")
    return {
        "images": CounterMetricFamily("diracnet_answered_images", "Images that the model answered", labels=of_model),
        "nan": CounterMetricFamily(
            "diracnet_not_a_number_images", "Images whose logits are not finite", labels=of_model
        ),
        "classes": CounterMetricFamily(
            "diracnet_predicted_images",
            f"Images by predicted class; of more than {MOST_CLASSES} classes the most frequent",
            labels=("digest", "index", "label"),
        ),
        "top_probability": HistogramMetricFamily(
            "diracnet_top_probability", "Probability of the predicted class", labels=of_model
        ),
        "margin": HistogramMetricFamily(
            "diracnet_margin", "Its difference from the probability of the second class", labels=of_model
        ),
        "drift": GaugeMetricFamily(
            "diracnet_drift", "Share of the latest images that differ from the model's reference", labels=of_part
        ),
        "chance": GaugeMetricFamily(
            "diracnet_drift_chance", "Drift that chance alone exceeds in 5 % of all cases", labels=of_part
        ),
        "window": GaugeMetricFamily("diracnet_drift_images", "Images that the drift is measured on", labels=of_part),
    }


def _add_counts(families: dict[str, Any], answers: Answers) -> None:
    digest, labels, totals = answers.model.digest, answers.model.spec.labels, answers.totals()
    counts = totals[_HEAD:]
    families["images"].add_metric([digest], totals[_NUM_IMAGES])
    families["nan"].add_metric([digest], totals[_NOT_A_NUMBER])
    classes = part(counts, "classes")
    shown = _most_frequent(classes, MOST_CLASSES) if len(classes) > MOST_CLASSES else range(len(classes))
    for index in shown:
        families["classes"].add_metric([digest, str(index), labels[index][:_LABEL_LENGTH]], classes[index])
    for name, total in (("top_probability", _SUM_TOP), ("margin", _SUM_MARGIN)):
        up_to = part(counts, name).cumsum().tolist()
        buckets = [(str(edge), number) for edge, number in zip(EDGES, up_to, strict=True)]
        families[name].add_metric([digest], [*buckets, ("+Inf", up_to[-1])], totals[total])


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
