"""A shadow compared with the model that serves: agreement, differences and time, counted over all workers."""

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from common.difference import share
from common.interval import interval
from export.runtimes.runtime import Model
from serve.watching.shared_counts import Counts, buckets

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_COMPARED, _AGREEING, _NOT_A_NUMBER, _DROPPED, _FAILED, _SUM_SECONDS, _LARGEST_ERROR, _LARGEST_VALUE, _HEAD = range(9)
_LARGEST = [_LARGEST_ERROR, _LARGEST_VALUE]  # the largest of all processes; all others are summed


class Comparison:
    """The comparison of two models with the same input and labels. Counts are of images."""

    def __init__(self, served: Model, shadow: Model) -> None:
        self.served, self.shadow = served, shadow
        self._counts = Counts(f"shadow-{served.digest}-{shadow.digest}", _HEAD + len(_SECONDS) + 1)

    def count_dropped(self) -> None:
        """The shadow was too far behind to answer an image."""
        self._counts.own[_DROPPED] += 1

    def count_failed(self) -> None:
        """The shadow raised, hung or ended on the batch of an image."""
        self._counts.own[_FAILED] += 1

    def count_seconds(self, seconds: float) -> None:
        """The time of one batch."""
        own = self._counts.own
        own[_SUM_SECONDS] += seconds
        own[_HEAD + bisect_left(_SECONDS, seconds)] += 1

    def compare(self, served: np.ndarray, shadow: np.ndarray) -> None:
        """Compare logits [N, K] of the same images; those of the served model are finite.

        Differences are defined as in `difference` in common/difference.py, over all images: the largest error as a
        share of the largest value. If either model gives probabilities, probabilities are compared.
        """
        own, is_finite = self._counts.own, np.isfinite(shadow).all(axis=1)
        own[_NOT_A_NUMBER] += len(shadow) - is_finite.sum()
        if not is_finite.any():
            return
        before, after = served[is_finite].astype(np.float64), shadow[is_finite].astype(np.float64)
        if self.served.gives_probabilities or self.shadow.gives_probabilities:
            before, after = self.served.probabilities(before), self.shadow.probabilities(after)
        own[_LARGEST_ERROR] = max(own[_LARGEST_ERROR], np.abs(before - after).max())
        own[_LARGEST_VALUE] = max(own[_LARGEST_VALUE], np.abs(before).max())
        own[_AGREEING] += (before.argmax(axis=1) == after.argmax(axis=1)).sum()
        own[_COMPARED] += len(before)

    def num_compared(self) -> int:
        """Images compared, of all processes."""
        return int(self._totals()[_COMPARED])

    def summary(self) -> dict[str, Any]:
        """For GET /model."""
        totals = self._totals()
        num, agreeing = int(totals[_COMPARED]), int(totals[_AGREEING])
        num_answered = num + totals[_NOT_A_NUMBER]
        return {
            "images": num,
            "agreement": {
                "hits": agreeing,
                "num": num,
                "value": agreeing / num if num else None,
                "interval": interval(agreeing, num),
            },
            "largest_difference": _largest_difference(totals) if num else None,
            "ms_per_image": 1000 * totals[_SUM_SECONDS] / num_answered if num_answered else None,
            "not_a_number": int(totals[_NOT_A_NUMBER]),
            "failed": int(totals[_FAILED]),
            "dropped": int(totals[_DROPPED]),
        }

    def metrics(self) -> Iterator[Metric]:
        """For Prometheus."""
        totals, counter = self._totals(), partial(self._metric, CounterMetricFamily)
        yield counter("images", "Images that both models answered", totals[_COMPARED])
        yield counter("agreeing_images", "Images to which both gave the same class", totals[_AGREEING])
        text = "Images to which the shadow gave logits that are not finite"
        yield counter("not_a_number_images", text, totals[_NOT_A_NUMBER])
        yield counter("failed_images", "Images on which the shadow failed, hung or ended", totals[_FAILED])
        yield counter("dropped_images", "Images dropped because the shadow was too far behind", totals[_DROPPED])
        text = "Largest difference of logits, as a share of the largest"
        yield self._metric(GaugeMetricFamily, "largest_difference", text, _largest_difference(totals))
        seconds = buckets(_SECONDS, totals[_HEAD:]), totals[_SUM_SECONDS]
        yield self._metric(HistogramMetricFamily, "seconds", "Seconds that the shadow took for a batch", *seconds)

    def _metric(self, kind: type[Any], name: str, text: str, *values: Any) -> Metric:
        family = kind(f"diracnet_shadow_{name}", text, labels=("digest", "shadow"))
        family.add_metric((self.served.digest, self.shadow.digest), *values)
        return family

    def _totals(self) -> np.ndarray:
        of_all = self._counts.of_all()
        totals = of_all.sum(axis=0)
        totals[_LARGEST] = of_all[:, _LARGEST].max(axis=0)
        return totals


def _largest_difference(totals: np.ndarray) -> float:
    return share(float(totals[_LARGEST_ERROR]), float(totals[_LARGEST_VALUE]))
