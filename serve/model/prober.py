"""Repeats a model's check while it serves, because memory and GPUs may fail."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from common.difference import difference
from export.compare import Tolerance
from export.model_file.probe import BATCH_TOLERANCE as ALONE_AND_AMONG_OTHERS
from export.runtimes.runtime import Model
from serve.model.check import Probe, read_probe
from serve.request.batcher import Batcher
from serve.request.job import Served
from serve.request.problems import OVERLOADED, Problem

MOST_SKIPPED = 9  # turns in a row while clients wait; the next turn queues with them
_log = logging.getLogger(__name__)


class Prober:
    """Sends probe images to `batcher` every `every_s` seconds. `error` and `fault` are those of the last turn."""

    def __init__(
        self,
        batcher: Batcher,
        *,
        every_s: float,
        deadline_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._batcher, self.every_s, self._deadline_s = batcher, every_s, deadline_s
        self._sleep, self._clock = sleep, clock
        self._served: Served | None = None  # the model of the fields below
        self._probe: Probe | None = None
        self._num_skipped = 0
        self.error: float | None = None  # largest relative difference; None before the first turn
        self.checked: float | None = None  # time of the last turn, in seconds since 1970
        self.num_failures = 0
        self._fault = ""
        self.observe: Callable[[Prober], None] = lambda prober: None

    @property
    def fault(self) -> str:
        """Why the server should get no requests; "" if it should."""
        return self._fault if self._batcher.served is self._served else ""

    async def run(self) -> NoReturn:
        """Probe until cancelled."""
        while True:
            await self._sleep(self.every_s)
            await self.turn()

    async def turn(self) -> None:
        """Probe once, unless clients wait. A new model starts over."""
        served = self._batcher.served
        if served is not self._served:
            self._served, self._probe, self._num_skipped = served, None, 0
            self.error, self.checked, self._fault = None, None, ""
        if self._batcher.num_held and self._num_skipped < MOST_SKIPPED:
            self._num_skipped += 1
            return
        self._num_skipped = 0
        try:
            error, fault = await self._ask(served.model)
        except Problem as problem:
            if problem.kind is OVERLOADED:
                return
            error, fault = float("inf"), problem.detail
        except Exception as exception:  # libraries raise their own
            error, fault = float("inf"), f"the model fails on its probe images ({type(exception).__name__})"
        if self._batcher.served is served:
            self._take(error, fault)

    def summary(self) -> dict[str, Any]:
        """For GET /model."""
        error = self.error if self.error is None or np.isfinite(self.error) else None
        return {
            "every_s": self.every_s,
            "error": error,
            "checked": self.checked,
            "failures": self.num_failures,
            "fault": self.fault or None,
        }

    async def _ask(self, model: Model) -> tuple[float, str]:
        """(error, fault)"""
        probe = self._probe or read_probe(model)
        loop = asyncio.get_running_loop()
        deadline, never = loop.time() + self._deadline_s, loop.create_future  # no client, which could go
        job = await self._batcher.classify(probe.images, top_k=1, deadline=deadline, receive=never, is_probe=True)
        expected = job.logits if probe.logits is None else probe.logits
        if probe.logits is None:  # the first ones are expected, which vary slightly with an image's batch
            probe = replace(probe, logits=expected, tolerance=Tolerance(largest=ALONE_AND_AMONG_OTHERS))
        self._probe = probe
        found = difference(expected, job.logits)
        if probe.tolerance.covers(found):
            return found.relative, ""
        return found.relative, (
            f"{model.name} answers its probe images {found.relative:.1e} away from the expected answers "
            f"(tolerance {probe.tolerance}): memory or GPU may be damaged; ask another server"
        )

    def _take(self, error: float, fault: str) -> None:
        if fault:
            self.num_failures += 1
            _log.error("not ready: %s", fault)
        elif self._fault:
            _log.warning("ready again: the probe images are answered as they should be")
        self.error, self._fault, self.checked = error, fault, self._clock()
        self.observe(self)
