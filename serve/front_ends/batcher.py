"""The batcher of a front end: it sends decoded images to the device process, which forms the batches.

Everything before and after the model is as in serve/request/batcher.py. A job between its pixels and its logits:

    _run           model thread    writes the decoded images into shared memory, and continues with the next jobs
    device.py      its process     one batch from all front ends
    _receive       event loop      logits → results

If the device process ends, jobs that were sent are answered 503; jobs that were not wait for its replacement.
"""

import asyncio
import logging
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from export.runtimes.runtime import Runtime
from serve.decode.process import HostBudget
from serve.front_ends.link import Dialer, Disconnected, Flight, Link, RemoteRuntime
from serve.model.check import in_daemon_thread
from serve.request.batcher import Batcher, deliver, give_results, soon
from serve.request.job import Decoded, Job, Served
from serve.request.limits import Limits
from serve.request.problems import NOT_READY, Problem

_AGAIN_S = 1.0
_log = logging.getLogger(__name__)


class FrontBatcher(Batcher):
    """A `Batcher` whose model is in another process."""

    def __init__(self, dial: Dialer, limits: Limits, budget: HostBudget | None = None) -> None:
        """Waits until the device process answers."""
        super().__init__(Served((dial.connect(),)), limits, budget)
        self._dial = dial
        self._changed = threading.Condition()  # `served`, or whether this is open
        self._following: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        return self._link.is_up

    @property
    def _link(self) -> Link:
        return _remote(self.served).link

    def start(self) -> None:
        super().start()
        self._use(_remote(self.served))

    async def close(self) -> None:
        if self._following:
            self._following.cancel()
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        await super().close()
        self._retire(self._link)

    def reload(self) -> Sequence[Runtime]:
        """Have the device process read its model's file again, and wait until new jobs use the new model."""
        number = self._dial.reload()
        with self._changed:
            self._changed.wait_for(lambda: _remote(self.served).number >= number or not self._is_open)
        return self.served.runtimes

    # In the model's thread

    def _run(self, runtime: Runtime, jobs: Sequence[Job], pixels: Sequence[list[Decoded | None]]) -> None:
        try:
            refused = self._send(jobs, pixels)
        except Exception as error:
            return self._refuse(jobs, error)
        if refused:
            problem = self._overloaded()
            problem.detail = f"the shared memory is full: {problem.detail}"
            self._refuse(refused, problem)

    def _refuse(self, jobs: Sequence[Job], problem: Exception) -> None:
        for job in jobs:
            job.outcome = problem
        soon(self._loop, deliver, jobs)

    def _send(self, jobs: Sequence[Job], pixels: Sequence[list[Decoded | None]]) -> Sequence[Job]:
        """Send the images. Returns the jobs that do not fit into the shared memory."""
        while served := self._find(jobs[0].served):
            for job in jobs:
                job.served = served  # keeps its link alive
            with suppress(Disconnected):
                return _remote(served).link.send(zip(jobs, pixels, strict=True))  # type: ignore[arg-type]
        raise _lost()

    def _find(self, served: Served) -> Served | None:
        """A live connection to the model of `served`, once there is one; None if another model has replaced it."""
        link = _remote(served).link
        with self._changed:
            self._changed.wait_for(lambda: link.is_up or self.is_up or not self._is_open)
            if link.is_up:
                return served
            return self.served if self.is_up and self.served.model.digest == served.model.digest else None

    # In the event loop

    def _use(self, remote: RemoteRuntime) -> None:
        """Send new jobs there. The previous link ends with the last of its jobs."""
        with self._changed:
            self.served = Served((remote,))
            self._changed.notify_all()
        self._loop.add_reader(remote.link.fileno(), self._receive, remote.link)
        weakref.finalize(remote, soon, self._loop, self._retire, remote.link).atexit = False

    def _receive(self, link: Link) -> None:
        try:
            finished = link.receive()
        except Disconnected:
            _log.warning("the connection to the device process has ended; pending requests get 503")
            return self._retire(link)
        if finished:
            self._answer(link, finished)
        if link.has_newer_model and link is self._link:
            self._follow()

    def _answer(self, link: Link, flights: Sequence[Flight]) -> None:
        good = [flight for flight in flights if not flight.has_failed]
        if bad := [flight for flight in flights if flight.has_failed]:
            link.take(bad)
            for flight in bad:
                flight.owner.outcome = RuntimeError("the model failed; the log of the device process says why")
        for is_probe in (False, True):  # probes are not counted as answers to clients
            if some := [flight for flight in good if flight.owner.is_probe == is_probe]:
                self._share(link, some)
        deliver([flight.owner for flight in flights])

    def _share(self, link: Link, flights: Sequence[Flight]) -> None:
        """Logits → results, for flights that were answered together."""
        now, start = monotonic(), 0
        logits, seconds = link.take(flights)
        jobs: list[Job] = [flight.owner for flight in flights]
        for job in jobs:
            job.model_s = max(seconds[start : start + job.num_images])
            job.queue_s = max(0.0, now - job.accepted - job.decode_s - job.model_s)
            start += job.num_images
        self._record_speed(max(seconds) / len(seconds))  # of this front end's part of the batch
        try:
            give_results(jobs, logits, self.watch)
        except Exception as error:
            for job in jobs:
                job.outcome = error

    def _retire(self, link: Link) -> None:
        """End a link; its unfinished jobs are lost."""
        if not link.is_up:
            return
        self._loop.remove_reader(link.fileno())
        jobs = [flight.owner for flight in link.end()]
        for job in jobs:
            job.outcome = _lost()
        deliver(jobs)
        if link is self._link and self._is_open:
            self._follow()

    def _follow(self) -> None:
        """Connect again, to a newer model or to the replacement of a process that ended."""
        if self._following is None or self._following.done():
            self._following = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        while self._link.has_newer_model or not self._link.is_up:
            try:
                self._use(await in_daemon_thread(self._dial.connect))
            except Exception as error:
                _log.error("no connection to the device process: %s; another attempt in %g s", error, _AGAIN_S)
                await asyncio.sleep(_AGAIN_S)


def _remote(served: Served) -> RemoteRuntime:
    (remote,) = served.runtimes
    assert isinstance(remote, RemoteRuntime)
    return remote


def _lost() -> Problem:
    detail = "the process that runs the model has ended and is being replaced; try again in 1 s"
    return Problem(NOT_READY, detail, {"Retry-After": "1"})
