"""From the bytes of a request's images to its results: one queue, decoders, and one thread for each runtime.

The life of a job, top to bottom:

    classify       event loop      refuses what is too much, puts the job's images into a queue
    _decode_jobs   decoder thread  bytes → pixels
    _run_jobs      model thread    all that is decoded by now → one batch → logits → results
    _deliver       event loop      every answer of the batch in one call

No timer holds a job back: a lone one runs at once, and while the model is busy the next batch gathers.
A job whose future is done (answered, late, or its client gone) is skipped by whoever takes it next.
"""

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from queue import Empty, SimpleQueue
from time import monotonic

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from export.runtimes.runtime import Model, Runtime
from serve.answer import ModelName, Result, results_of
from serve.decode import decode_image, find_problem
from serve.limits import Limits
from serve.problems import DEADLINE, NOT_A_NUMBER, NOT_READY, OVERLOADED, Problem
from train.refusal import Refusal

_PATIENCE_S = 0.1  # nearly all jobs are done by then, and a watch costs a tenth of a request
_LAST_BATCH_S = 1.0
_SMOOTHING = 0.9  # of the measured seconds per image; a dozen batches forget a slow one


@dataclass(frozen=True, eq=False)
class Served:
    """One loaded model: a runtime for each device."""

    runtimes: tuple[Runtime, ...]

    @property
    def model(self) -> Model:
        return self.runtimes[0].model

    @cached_property
    def name(self) -> ModelName:
        """How answers name it."""
        return {"name": self.model.name, "digest": self.model.digest}


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way. `served` computes all of it, whatever is swapped in meanwhile.

    `contents` are files to decode, or pixels uint8 [N, H, W, C] as the model takes them.
    """

    contents: list[bytes] | np.ndarray
    served: Served
    top_k: int
    future: "asyncio.Future[list[Result]]"
    accepted: float
    pixels: list[np.ndarray | Refusal | None]
    num_undecoded: int
    outcome: list[Result] | Exception = field(default_factory=list)
    logits: np.ndarray = field(init=False)  # [N, K], once the outcome is there
    decode_s: float = 0.0
    queue_s: float = 0.0
    model_s: float = 0.0
    timer: asyncio.TimerHandle | None = None
    watch: "asyncio.Future[Message] | None" = None


class Batcher:
    """All jobs of one server; lives on the event loop that calls `start`."""

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served = served
        self._limits = limits
        self._undecoded: SimpleQueue[tuple[Job, int] | None] = SimpleQueue()
        self._decoded: SimpleQueue[Job | None] = SimpleQueue()
        self._lock = threading.Lock()  # of `num_undecoded`
        self._decoders: list[threading.Thread] = []
        self._runners: list[threading.Thread] = []
        self._is_open = False
        self.seconds_per_image = 0.0
        self.num_held = 0  # images accepted and not answered
        self.observe_batch: Callable[[int], None] = lambda num_images: None

    def start(self) -> None:
        """Take jobs from now on."""
        self._loop = asyncio.get_running_loop()
        self._decoders = [
            threading.Thread(target=self._decode_jobs, name=f"decode-{index}", daemon=True)
            for index in range(self._limits.decode_threads)
        ]
        self._runners = [
            threading.Thread(target=self._run_jobs, args=(index,), name=f"model-{index}", daemon=True)
            for index in range(len(self.served.runtimes))
        ]
        for thread in self._decoders + self._runners:
            thread.start()
        self._is_open = True

    async def close(self) -> None:
        """Take no more jobs; whoever waited is answered or gone by now. A model that hangs is left behind."""
        self._is_open = False
        await asyncio.to_thread(self._end_threads, monotonic() + _LAST_BATCH_S)

    def check_room(self, num_images: int) -> None:
        """Refuses so many more images where they would be too many, or the server does not run."""
        if not self._is_open:
            raise Problem(NOT_READY, "the server is starting or stopping; ask again in a moment")
        if self.num_held + num_images > self._limits.max_queue:
            raise self._overloaded()

    async def classify(
        self, contents: list[bytes] | np.ndarray, *, top_k: int, deadline: float, receive: Receive
    ) -> Job:
        """The finished job of `contents`. `deadline` is the loop's time; `receive` returns when the client is gone."""
        num_images = len(contents)
        self.check_room(num_images)
        future = self._loop.create_future()
        job = _make_job(contents, self.served, top_k, future)
        self.num_held += num_images
        until = min(self._loop.time() + _PATIENCE_S, deadline)
        job.timer = self._loop.call_at(until, self._watch, job, deadline, receive)
        try:
            self._enqueue(job)
            await future
        except asyncio.CancelledError:
            if job.watch and job.watch.done():
                raise ClientDisconnect from None
            raise
        finally:
            for pending in (job.timer, job.watch):
                if pending:
                    pending.cancel()
            self.num_held -= num_images
        return job

    def _watch(self, job: Job, deadline: float, receive: Receive) -> None:
        """A job that is not answered at once: its client may go away and its deadline pass."""
        job.watch = asyncio.ensure_future(receive())
        job.watch.add_done_callback(lambda _: job.future.cancel())
        job.timer = self._loop.call_at(deadline, _expire, job.future, self._limits.deadline_s)

    def _enqueue(self, job: Job) -> None:
        if self._decoders and job.num_undecoded:
            for index in range(len(job.contents)):
                self._undecoded.put((job, index))
        else:
            self._decoded.put(job)

    def _decode_jobs(self) -> None:
        while self._decode_next():
            pass

    def _decode_next(self) -> bool:
        """One image; False at the end. Who waits for it holds no job, and so no model that was swapped out."""
        item = self._undecoded.get()
        if item is None:
            return False
        job, index = item
        self._decode(job, index)
        with self._lock:
            job.num_undecoded -= 1
            is_last = not job.num_undecoded
        if is_last and self._is_runnable(job):
            self._decoded.put(job)
        return True

    def _decode(self, job: Job, index: int) -> None:
        if not job.future.done():
            start = monotonic()
            spec = job.served.model.spec.image
            job.pixels[index] = decode_image(job.contents[index], spec, max_pixels=self._limits.max_pixels)
            job.decode_s += monotonic() - start

    def _is_runnable(self, job: Job) -> bool:
        """Whether all images of a job are there and still wanted; answers it where one is bad."""
        if job.future.done():
            return False
        if problem := find_problem(job.pixels):
            job.outcome = problem
            self._loop.call_soon_threadsafe(_deliver, [job])
            return False
        return True

    def _run_jobs(self, device: int) -> None:
        while self._run_next(device):
            pass

    def _run_next(self, device: int) -> bool:
        """One batch; False at the end. Who waits for it holds no job, as in `_decode_next`."""
        first = self._decoded.get()
        if first is None:
            return False
        for served, jobs in groupby(self._gather(first), key=lambda job: job.served):
            self._run(served.runtimes[device], list(jobs))
        return True

    def _gather(self, job: Job) -> list[Job]:
        """`job` and those that wait behind it, until `max_batch` images are together or none waits."""
        jobs: list[Job] = []
        num_images = 0
        while True:
            for index in range(job.num_undecoded):  # there are no decoder threads
                self._decode(job, index)
            if self._is_runnable(job):
                jobs.append(job)
                num_images += len(job.contents)
            if num_images >= self._limits.max_batch or not (next_job := self._next()):
                return jobs
            job = next_job

    def _next(self) -> Job | None:
        try:
            job = self._decoded.get_nowait()
        except Empty:
            return None
        if job is None:
            self._decoded.put(None)  # the end: for the one who waits
        return job

    def _run(self, runtime: Runtime, jobs: list[Job]) -> None:
        start = monotonic()
        try:
            logits = self._compute(runtime, [image for job in jobs for image in job.pixels])  # type: ignore[misc]
            top_k = [job.top_k for job in jobs for _ in job.contents]
            _share(jobs, runtime.model, logits, top_k)
        except Exception as error:  # whatever a runtime raises is the answer of all its jobs
            for job in jobs:
                job.outcome = error
        end = monotonic()
        for job in jobs:
            job.model_s = end - start
            job.queue_s = start - job.accepted - job.decode_s
        per_image = (end - start) / sum(len(job.contents) for job in jobs)
        self.seconds_per_image = _SMOOTHING * (self.seconds_per_image or per_image) + (1 - _SMOOTHING) * per_image
        self._loop.call_soon_threadsafe(_deliver, jobs)

    def _compute(self, runtime: Runtime, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images → logits [N, K], `max_batch` at a time."""
        size = self._limits.max_batch
        batches = [np.stack(images[start : start + size]) for start in range(0, len(images), size)]
        for batch in batches:
            self.observe_batch(len(batch))
        return np.concatenate([runtime(batch) for batch in batches])

    def _overloaded(self) -> Problem:
        wait_s = max(1, math.ceil(self.num_held * self.seconds_per_image / len(self.served.runtimes)))
        detail = f"{self.num_held} images are waiting; ask again in {wait_s} s"
        return Problem(OVERLOADED, detail, {"Retry-After": str(wait_s)})

    def _end_threads(self, until: float) -> None:
        for queue, threads in ((self._undecoded, self._decoders), (self._decoded, self._runners)):
            for _ in threads:
                queue.put(None)
            for thread in threads:
                thread.join(max(0.0, until - monotonic()))


def _make_job(
    contents: list[bytes] | np.ndarray, served: Served, top_k: int, future: "asyncio.Future[list[Result]]"
) -> Job:
    if isinstance(contents, np.ndarray):
        return Job(contents, served, top_k, future, monotonic(), pixels=list(contents), num_undecoded=0)
    num_images = len(contents)
    return Job(contents, served, top_k, future, monotonic(), [None] * num_images, num_images)


def _expire(future: "asyncio.Future[list[Result]]", deadline_s: float) -> None:
    if not future.done():
        future.set_exception(Problem(DEADLINE, f"there was no answer within {deadline_s:g} s; ask again later"))


def _share(jobs: list[Job], model: Model, logits: np.ndarray, top_k: list[int]) -> None:
    """Give each job its rows; rows that are no numbers are the problem of their own job only."""
    is_finite = np.logical_and.reduce(np.isfinite(logits), axis=1)
    finite = np.where(is_finite[:, None], logits, 0)
    results = results_of(finite, model.spec.labels, top_k, are_probabilities=model.gives_probabilities)
    start = 0
    for job in jobs:
        rows = slice(start, start := start + len(job.contents))
        job.outcome, job.logits = results[rows], logits[rows]
        if not is_finite[rows].all():
            index = int(np.argmin(is_finite[rows]))
            detail = f"image {index} overflows {model.name}; export the model in a higher precision"
            job.outcome = Problem(NOT_A_NUMBER, detail)


def _deliver(jobs: list[Job]) -> None:
    for job in jobs:
        if job.future.done():
            continue
        if isinstance(job.outcome, Exception):
            job.future.set_exception(job.outcome)
        else:
            job.future.set_result(job.outcome)
