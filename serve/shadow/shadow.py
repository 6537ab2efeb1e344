"""A shadow: a second model that answers a share of the images, and is compared with the one that serves.

Its answers never reach a client. It runs in its own process at low priority (serve/model/process.py). The model's
thread puts images into a queue without waiting; a thread here sends them to the process and compares. Images that do
not fit into the queue are dropped and counted.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from queue import SimpleQueue
from random import random
from typing import Any

import numpy as np
from prometheus_client.core import GaugeMetricFamily, Metric

from common.child import ProcessFailed
from common.refusal import Refusal
from common.spec import ImageSpec
from export.runtimes.runtime import Model, Runtime
from serve.config import ServeConfig
from serve.model.process import BatchFailed, ModelProcess
from serve.request.problems import NOT_COMPARED, Problem
from serve.shadow.comparison import Comparison
from serve.watching.shared_counts import Counts

_BATCHES_WAITING = 4
_PATIENCE_S = 30.0  # for a batch; far longer than any usable model takes
_LONGEST_DELAY_S = 60.0
_NICE = 15  # lower priority than the model and the decoders (5)
_KEPT = 8  # pairs of models whose figures are kept in memory
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Offer:
    """An image, and the logits [K] of the model that serves."""

    comparison: Comparison
    image: np.ndarray
    logits: np.ndarray


class Shadow:
    """`offer` takes batches; `comparison_of` is the result. The rest happens in a thread and a process."""

    def __init__(
        self,
        source: Callable[[], ServeConfig],
        load: Callable[[str], Sequence[Runtime]],
        take_over: Callable[[], None],
        *,
        share: float,
        num_images: int,
        max_batch: int,
    ) -> None:
        """`source` gives the config of the shadow. `load` gives its runtimes, and refuses a file with another digest.

        `take_over` is called just before they serve: from then on, `source` gives the config of the model before.
        """
        self._source, self.load, self._swap_files = source, load, take_over
        self.share, self._num_images, self._max_batch = share, num_images, max_batch
        self.model: Model | None = None  # once it is loaded
        self._description = ""  # of its runtime
        self._running = Counts("shadow-running", 1)
        self._served: Callable[[], Model] | None = None
        self._process: ModelProcess | None = None
        self._pairs: dict[tuple[str, str], Comparison | None] = {}  # None: the two cannot be compared
        self._offers: SimpleQueue[_Offer | None] = SimpleQueue()  # None: wake up
        self._delay_s = 0.0
        self._lock = threading.Lock()
        self._news = threading.Event()  # ends the delay before a restart
        self._is_new, self._has_ended = False, False
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)

    def prepare(self, served: Model) -> None:
        """Start the process before the server is ready; refuses a model that cannot be loaded, or does not fit."""
        self._process = start_process(self._source())
        refuse_unfit(served, self._process.model)

    def start(self, served: Callable[[], Model]) -> None:
        """`served` gives the model that answers now."""
        self._served = served
        self._thread.start()

    def close(self) -> None:
        """End the process, even while it computes."""
        self._has_ended = True
        self._wake()

    def restart(self) -> None:
        """Read the shadow's file again, which promotion may have changed."""
        self._is_new, self.model = True, None
        self._wake()

    def take_over(self) -> None:
        """The shadow serves now, and the previous model becomes the shadow."""
        self._swap_files()
        self.restart()

    def offer(self, model: Model, images: Sequence[np.ndarray], logits: np.ndarray, is_finite: np.ndarray) -> None:
        """A batch that `model` answered with `logits` [N, K]. Called in the model's thread; never waits."""
        comparison = self.comparison_of(model)
        if comparison is None:
            return
        for index in np.flatnonzero(is_finite).tolist():
            if random() >= self.share:
                continue
            if self._offers.qsize() < _BATCHES_WAITING * self._max_batch:
                self._offers.put(_Offer(comparison, images[index], logits[index]))
            else:
                with self._lock:
                    comparison.count_dropped()

    def comparison_of(self, model: Model) -> Comparison | None:
        """The comparison with `model`; None before the shadow is loaded, or if the two cannot be compared."""
        shadow = self.model
        return self._pair(model, shadow) if shadow else None

    def promotable(self) -> str:
        """The digest of the shadow; refuses until it has been compared with the current model on enough images."""
        shadow = self.model
        if shadow is None or self._served is None:
            raise Problem(NOT_COMPARED, "the shadow is not loaded yet; if it cannot be loaded, the log says why")
        served = self._served()
        pairs = self._pair(served, shadow), self._pair(shadow, served)
        num = sum(pair.num_compared() for pair in pairs if pair)
        if num < self._num_images:
            detail = (
                f"{num:,} images were compared of the {self._num_images:,} that --shadow-images asks for; "
                f"{self._num_images - num:,} are missing, at a share of {self.share:g}"
            )
            raise Problem(NOT_COMPARED, detail)
        return shadow.digest

    def summary(self) -> dict[str, Any]:
        """For GET /model."""
        shadow = self.model
        if shadow is None or self._served is None:
            return {"is_running": False}
        found = self.comparison_of(self._served())
        named = {"name": shadow.name, "digest": shadow.digest, "runtime": self._description}
        asked = {"is_running": bool(self._running.own[0]), "share": self.share, "images_to_promote": self._num_images}
        return {**named, **asked, **(found.summary() if found else {"images": 0})}

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        num = self._running.of_living().sum()
        yield GaugeMetricFamily("diracnet_shadow_running", "Workers whose shadow answers", value=num)
        if self._served and (comparison := self.comparison_of(self._served())):
            yield from comparison.metrics()

    def _pair(self, served: Model, shadow: Model) -> Comparison | None:
        key = served.digest, shadow.digest
        if key not in self._pairs:
            with self._lock:
                if key not in self._pairs:
                    reason = why_unfit(served, shadow)
                    if reason:
                        _log.warning("%s cannot shadow %s: %s", shadow.name, served.name, reason)
                    comparison = None if reason else Comparison(served, shadow)
                    self._pairs = dict([*self._pairs.items(), (key, comparison)][-_KEPT:])
        return self._pairs.get(key)

    def _wake(self) -> None:
        self._news.set()
        self._offers.put(None)
        if process := self._process:
            process.kill()

    def _run(self) -> None:
        while not self._has_ended:
            self._is_new = False
            self._news.clear()
            try:
                with self._process or start_process(self._source()) as self._process:
                    self._serve(self._process)
            except (Refusal, ProcessFailed, OSError) as failure:  # the last: no process can be made
                if not (self._is_new or self._has_ended):
                    self._delay_s = min(_LONGEST_DELAY_S, max(1.0, 2 * self._delay_s))
                    _log.warning("the shadow restarts in %g s: %s", self._delay_s, failure)
                    self._running.own[0] = 0
                    self._news.wait(self._delay_s)
            finally:
                self._process, self._running.own[0] = None, 0

    def _serve(self, process: ModelProcess) -> None:
        """Compare offered batches until the shadow is restarted or closed. Raises ProcessFailed."""
        self.model, self._description = shadow, _ = process.model, process.description
        self._running.own[0] = 1
        _log.warning("%s %s shadows the model", shadow.name, shadow.digest)
        may_log = True
        while not (self._is_new or self._has_ended):
            offers = self._gather()
            if not offers:
                continue
            try:
                seconds, logits = process.ask(np.stack([offer.image for offer in offers]), _PATIENCE_S)
            except (BatchFailed, ProcessFailed) as failure:
                for offer in offers:
                    offer.comparison.count_failed()
                if isinstance(failure, ProcessFailed):
                    raise
                if may_log:
                    _log.warning("the shadow fails: %s; /metrics counts further failures", failure)
                may_log = False
                continue
            self._delay_s = 0.0
            offers[0].comparison.count_seconds(seconds)
            for comparison, group in groupby(offers, key=lambda offer: offer.comparison):
                served = np.stack([offer.logits for offer in group])
                comparison.compare(served, logits[: len(served)])
                logits = logits[len(served) :]

    def _gather(self) -> list[_Offer]:
        """Waiting offers, up to a batch, without those made for the previous shadow."""
        offers = [self._offers.get()]
        while len(offers) < self._max_batch and not self._offers.empty():
            offers.append(self._offers.get())
        shadow = self.model
        return [offer for offer in offers if offer and shadow and offer.comparison.shadow.digest == shadow.digest]


def start_process(config: ServeConfig) -> ModelProcess:
    """At low priority, with one thread."""
    return ModelProcess(replace(config, workers=1, model_threads=1, devices=config.devices[:1]), nice=_NICE)


def refuse_unfit(served: Model, shadow: Model) -> None:
    """Refuses a shadow that cannot answer the requests of the served model."""
    if reason := why_unfit(served, shadow):
        raise Refusal(f"{shadow.name} cannot shadow {served.name}: {reason}; export it for the same images and classes")


def why_unfit(served: Model, shadow: Model) -> str | None:
    """Why `shadow` cannot answer the requests of `served`; None if it can."""
    before, after = served.spec, shadow.spec
    if (before.image.shape, before.image.resize) != (after.image.shape, after.image.resize):
        return f"it takes images of {_input_of(after.image)}, not of {_input_of(before.image)}"
    if len(before.labels) != len(after.labels):
        return f"it has {len(after.labels)} labels, not {len(before.labels)}"
    for index, (expected, found) in enumerate(zip(before.labels, after.labels, strict=True)):
        if expected != found:
            return f"its label {index} is {found[:40]!r}, not {expected[:40]!r}"
    return None


def _input_of(image: ImageSpec) -> str:
    size = "x".join(map(str, image.shape))
    return f"{size}, cut from a shorter side of {image.resize}" if image.resize else f"{size}, scaled to it"
