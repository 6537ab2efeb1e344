"""From the bytes of a request's images to its results: decoders, one queue, and one thread for each runtime.

The life of a job:

    classify       event loop        refuses too many images, queues the job for decoding
    DecoderPool    its threads       bytes → pixels (serve/decode/pool.py)
    _run_next      model's thread    every decoded job (`_form_batch`) → logits → results
    deliver        event loop        all answers of the batch in one call

No timer holds a job back: a lone one runs at once, and while the model is busy the next batch forms.
A job that is given up (too late, or its client has gone) drops its bytes and is skipped.
"""

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain, groupby
from queue import Empty, SimpleQueue
from time import monotonic

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from export.runtimes.runtime import Runtime, best
from serve.decode.pool import DecoderPool, find_problem
from serve.decode.process import Budget
from serve.request.job import Decoded, Job, Result, Served, result_of
from serve.request.limits import Limits
from serve.request.problems import DEADLINE, NOT_A_NUMBER, NOT_READY, OVERLOADED, Problem
from serve.shadow.shadow import Shadow
from serve.watching.answers import Watch

_PATIENCE_S = 0.1  # before the client is watched, which costs a tenth of a request: nearly all jobs are done by then
_LAST_BATCH_S = 1.0
_SMOOTHING = 0.9  # of the measured seconds per image; a dozen batches forget a slow one


class Batcher:
    """All jobs of one server, on the event loop that calls `start`."""

    is_up = True  # whether the model can be reached: serve/front_ends/batcher.py has it in another process

    def __init__(self, served: Served, limits: Limits, budget: Budget | None = None) -> None:
        """`budget` is the memory for heavy images, if processes share it."""
        self.served = served
        self._limits = limits
        self.decoding = DecoderPool(limits, self._take_decoded, budget)
        self._decoded: SimpleQueue[Job | None] = SimpleQueue()
        self._runners: list[threading.Thread] = []
        self._is_open = False
        self.is_ready = False  # set by the app: warmed up and not stopping
        self.seconds_per_image = 0.0
        self.num_held = 0  # images accepted and not answered
        self.observe_batch: Callable[[int], None] = lambda num_images: None
        self.find_fault: Callable[[], str] = lambda: ""  # why it is not ready: serve/model/prober.py
        self.observe_run: Callable[[Runtime], None] = lambda runtime: None  # that has computed a batch
        self.watch = Watch()
        self.shadow: Shadow | None = None

    def start(self) -> None:
        """Begin to take jobs."""
        self._loop = asyncio.get_running_loop()
        self._runners = [
            threading.Thread(target=self._run_jobs, args=(index,), name=f"model-{index}", daemon=True)
            for index in range(len(self.served.runtimes))
        ]
        self.decoding.start()
        for thread in self._runners:
            thread.start()
        self._is_open = True

    async def close(self) -> None:
        """Take no more jobs. By now every request has ended; a model that hangs is left behind."""
        self._is_open = False
        await asyncio.to_thread(self._end_threads, monotonic() + _LAST_BATCH_S)

    def check_room(self, num_images: int) -> None:
        """Refuses `num_images` more if they are too many, or if the server is not running."""
        if not self._is_open:
            raise Problem(NOT_READY, "the server is starting or stopping; retry in a moment")
        num_held = self.num_held + num_images
        if num_held > self._limits.max_queue:
            raise self._overloaded()
        is_many = num_held > self._limits.max_images
        if is_many and num_held * math.prod(self.served.model.spec.image.shape) > self._limits.max_held_bytes:
            raise self._overloaded()  # all their pixels may be waiting for the model at once

    def check_ready(self) -> None:
        """Refuses while the server starts or stops, cannot decode, or answers its probe images wrongly."""
        if not self.is_ready:
            raise Problem(NOT_READY, "the server is starting or stopping; retry in a moment")
        if not self.is_up:
            raise Problem(NOT_READY, "the process that runs the model is being replaced; retry in a moment")
        if self.decoding.is_stalled():
            raise Problem(NOT_READY, "images wait, and none has been decoded for a while; try another server")
        if fault := self.find_fault():
            raise Problem(NOT_READY, fault)

    async def classify(
        self,
        contents: list[bytes] | np.ndarray,
        *,
        top_k: int,
        deadline: float,
        receive: Receive,
        is_probe: bool = False,
    ) -> Job:
        """The finished job of `contents`. `deadline` is the loop's time; `receive` returns when the client has gone."""
        num_images = len(contents)
        self.check_room(num_images)
        future = self._loop.create_future()
        is_decoded = isinstance(contents, np.ndarray)
        pixels: list[Decoded | None] = list(contents) if is_decoded else [None] * num_images
        job = Job(contents, num_images, self.served, top_k, future, monotonic(), pixels, is_probe=is_probe)
        del contents, pixels
        self.num_held += num_images
        until = min(self._loop.time() + _PATIENCE_S, deadline)
        job.timer = self._loop.call_at(until, self._watch, job, deadline, receive)
        try:
            if is_decoded or not self.decoding.put(job):
                self._decoded.put(job)
            await future
            return job
        except BaseException as error:
            self.decoding.give_up(job)
            if isinstance(error, asyncio.CancelledError) and job.watch and job.watch.done():
                raise ClientDisconnect from None
            raise
        finally:
            for pending in (job.timer, job.watch):
                if pending:
                    pending.cancel()
            self.num_held -= num_images
            del job, future  # or an exception's traceback would keep it and the callers' bytes alive

    def _watch(self, job: Job, deadline: float, receive: Receive) -> None:
        """Give up the job if its client goes, or at the deadline."""
        job.watch = asyncio.ensure_future(receive())
        job.watch.add_done_callback(lambda _: job.future.cancel())
        job.timer = self._loop.call_at(deadline, _expire, job.future, self._limits.deadline_s)

    def _take_decoded(self, job: Job) -> None:
        """Called in a decoder's thread."""
        if self._is_runnable(job):
            self._decoded.put(job)

    def _is_runnable(self, job: Job) -> bool:
        """Whether all images of a job are decoded and still wanted; refuses it if one is bad."""
        if job.future.done() or job.num_undecoded:
            return False
        if problem := find_problem(job.pixels):
            job.outcome = problem
            soon(self._loop, deliver, [job])
            return False
        return True

    def _run_jobs(self, device: int) -> None:
        while self._run_next(device):
            pass

    def _run_next(self, device: int) -> bool:
        """One batch; False at the end. A waiting thread holds no job, as in serve/decode/pool.py."""
        first = self._decoded.get()
        if first is None:
            return False
        for (served, _), jobs in groupby(self._form_batch(first), key=lambda pair: (pair[0].served, pair[0].is_probe)):
            self._run(served.runtimes[device], *zip(*jobs, strict=True))
        return True

    def _form_batch(self, job: Job) -> list[tuple[Job, list[Decoded | None]]]:
        """`job` and those behind it with their pixels, until there are `max_batch` images or none waits."""
        jobs, num_images = [], 0
        while True:
            if not self._limits.decode_threads:
                self.decoding.decode_rest(job)
            pixels = job.pixels  # read first: a job that is given up after the next line runs all the same
            if self._is_runnable(job):
                jobs.append((job, pixels))
                num_images += job.num_images
            if num_images >= self._limits.max_batch or not (next_job := self._next()):
                return jobs
            job = next_job

    def _next(self) -> Job | None:
        try:
            job = self._decoded.get_nowait()
        except Empty:
            return None
        if job is None:
            self._decoded.put(None)  # the end, for `_run_next`
        return job

    def _run(self, runtime: Runtime, jobs: Sequence[Job], pixels: Sequence[list[Decoded | None]]) -> None:
        start = monotonic()
        try:
            images: list[np.ndarray] = [*chain.from_iterable(pixels)]  # type: ignore[arg-type]
            is_probe = jobs[0].is_probe  # as all of them
            logits = self._compute(runtime, images, is_probe=is_probe)
            is_finite = give_results(jobs, logits, self.watch)
            if self.shadow and not is_probe:
                self.shadow.offer(runtime.model, images, logits, is_finite)
        except Exception as error:  # of whatever type: it is the outcome of all jobs
            for job in jobs:
                job.outcome = error
        end = monotonic()
        for job in jobs:
            job.model_s = end - start
            job.queue_s = max(0.0, start - job.accepted - job.decode_s)  # a rounded sum of times may exceed it
        self._record_speed((end - start) / sum(job.num_images for job in jobs))
        soon(self._loop, deliver, jobs)

    def _compute(self, runtime: Runtime, images: Sequence[np.ndarray], *, is_probe: bool) -> np.ndarray:
        """Images → logits [N, K], `max_batch` at a time."""
        size, logits = self._limits.max_batch, []
        for start in range(0, len(images), size):
            batch = np.stack(images[start : start + size])
            self.observe_batch(len(batch))
            logits.append(runtime(batch))
            if not is_probe:
                self.observe_run(runtime)
        return np.concatenate(logits)

    def _record_speed(self, per_image: float) -> None:
        self.seconds_per_image = _SMOOTHING * (self.seconds_per_image or per_image) + (1 - _SMOOTHING) * per_image

    def _overloaded(self) -> Problem:
        wait_s = max(1, math.ceil(self.num_held * self.seconds_per_image / len(self.served.runtimes)))
        detail = f"{self.num_held} images are waiting; retry in {wait_s} s"
        return Problem(OVERLOADED, detail, {"Retry-After": str(wait_s)})

    def _end_threads(self, until: float) -> None:
        self.decoding.end(until)
        for _ in self._runners:
            self._decoded.put(None)
        for thread in self._runners:
            thread.join(max(0.0, until - monotonic()))


def soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(function, *args)


def _expire(future: "asyncio.Future[list[Result]]", deadline_s: float) -> None:
    if not future.done():
        future.set_exception(Problem(DEADLINE, f"there was no answer within {deadline_s:g} s; retry later"))


def give_results(jobs: Sequence[Job], logits: np.ndarray, watch: Watch) -> np.ndarray:
    """Give each job its results, or a problem if its own rows are not finite. Returns which rows are finite.

    The jobs are all probes, which `watch` does not count, or none is.
    """
    model, top_k = jobs[0].served.model, [job.top_k for job in jobs for _ in range(job.num_images)]
    is_finite = np.logical_and.reduce(np.isfinite(logits), axis=1)
    finite = np.where(is_finite[:, None], logits, 0)
    order = best(finite, max(2, *top_k))  # no temperature moves a class
    ranked = np.take_along_axis(model.probabilities(finite), order, axis=1)
    if not jobs[0].is_probe:
        watch(model, is_finite, order, ranked)
    results = [result_of(*row, model.spec.labels) for row in zip(order.tolist(), ranked.tolist(), top_k, strict=True)]
    start = 0
    for job in jobs:
        rows = slice(start, start := start + job.num_images)
        job.outcome, job.logits = results[rows], logits[rows]
        if not is_finite[rows].all():
            which = f"image {np.argmin(is_finite[rows]) + 1} of {job.num_images}" if job.num_images > 1 else "the image"
            detail = f"{which} overflows {model.name}; export the model in a higher precision"
            job.outcome = Problem(NOT_A_NUMBER, detail)
    return is_finite


def deliver(jobs: Sequence[Job]) -> None:
    """Resolve the futures of finished jobs, in the event loop."""
    for job in jobs:
        future, outcome = job.future, job.outcome
        if isinstance(outcome, Exception):
            job.outcome = []  # or the exception would keep itself alive, as in `classify`
            if not future.done():
                future.set_exception(outcome)
        elif not future.done():
            future.set_result(outcome)
