"""Where images are decoded: light ones by threads of this process, heavy ones by processes that can be killed.

A thread cannot be ended, so it decodes only images whose header says that they are quick. A light image takes 11 µs in
a thread and 88 µs in a process. For a heavy one this does not matter, and a process leaves Python's lock free.
"""

import io
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count
from queue import SimpleQueue
from time import monotonic

from PIL import Image

from common.image import FORMATS, TooManyPixels, decode
from common.refusal import Refusal
from common.spec import ImageSpec
from serve.decode.process import Budget, Decoder, TookTooLong
from serve.decode.weigh import NO_WEIGHT, Weight, is_light, weigh
from serve.request.job import Decoded, Job
from serve.request.limits import Limits
from serve.request.problems import TOO_MANY_PIXELS, UNDECODABLE, Problem

_Decode = Callable[[bytes, ImageSpec], Decoded]
_log = logging.getLogger(__name__)
_AGEING = 10.0  # seconds that a job lets lighter ones overtake it, for each second that it takes to decode


class ImageQueue:
    """A queue of images, each a job and an index: the earliest due first, equal ones in order of arrival.

    An image is due at its arrival plus its weight, so light ones overtake heavy ones, but only for a while.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Job, int]] = []
        self._numbers = count()
        self._lock = threading.Lock()
        self._news: SimpleQueue[bool] = SimpleQueue()  # True for each image that was put; False: the end

    def put(self, due: float, job: Job, index: int) -> None:
        with self._lock:
            heappush(self._waiting, (due, next(self._numbers), job, index))
        self._news.put(True)

    def get(self) -> tuple[Job, int] | None:
        """The next image, waiting for one; None at the end."""
        while self._news.get():
            with self._lock:
                if self._waiting:  # unless the image was dropped
                    _, _, job, index = heappop(self._waiting)
                    return job, index
        return None

    def drop(self, job: Job) -> None:
        """Forget all images of `job`."""
        with self._lock:
            self._waiting = [entry for entry in self._waiting if entry[2] is not job]
            heapify(self._waiting)

    def end(self) -> None:
        """One thread gets None."""
        self._news.put(False)


class DecoderPool:
    """Fills in the pixels of jobs. `on_decoded` is called in a decoder's thread with each complete job."""

    def __init__(self, limits: Limits, on_decoded: Callable[[Job], None], budget: Budget | None = None) -> None:
        self._limits = limits
        self._on_decoded = on_decoded
        self._light: ImageQueue = ImageQueue()
        self._heavy: ImageQueue = ImageQueue()
        self._budget = budget or Budget(limits.heavy_bytes)
        self.on_replace: Callable[[], None] = lambda: None  # a decoder that ended on an image
        decoder = partial(Decoder, limits.decode_s, patience_s=limits.deadline_s, on_end=lambda: self.on_replace())
        self._decoders = [decoder() for _ in range(limits.decode_processes)]
        thread, heavy = partial(threading.Thread, target=self._work, daemon=True), enumerate(self._decoders)
        self._threads = [
            *(thread(name=f"decode-{index}", args=(self._light, None)) for index in range(limits.decode_threads)),
            *(thread(name=f"decode-heavy-{index}", args=(self._heavy, decoder)) for index, decoder in heavy),
        ]
        self._lock = threading.Lock()  # of all that follows, and of what a job says of its decoding
        self._in_work: dict[int, tuple[Job, int]] = {}  # by a decoder's thread: the job, and the bytes of its image
        self._last_decoded = monotonic()
        self.given_up_bytes = 0  # of images in work that nobody waits for any more

    def start(self) -> None:
        """Begin to decode."""
        for thread in self._threads:
            thread.start()

    def end(self, until: float) -> None:
        """Decode nothing more; decoders that are still at work at the time `until` are killed."""
        for _ in range(self._limits.decode_threads):
            self._light.end()
        for _ in self._decoders:
            self._heavy.end()
        for thread in self._threads:
            thread.join(max(0.0, until - monotonic()))
        for decoder in self._decoders:
            decoder.kill()

    def put(self, job: Job) -> bool:
        """Queue a job's images; False if none was queued. The rest, if any, is for `decode_rest`."""
        spec, due, queued = job.served.model.spec.image, job.accepted, []
        for index, content in enumerate(job.contents):
            try:
                weight = weigh(content, spec, max_pixels=self._limits.max_pixels, max_bytes=self._limits.heavy_bytes)
            except Refusal as refusal:
                job.pixels[index] = without_traceback(refusal)
                job.weights.append(NO_WEIGHT)
                continue
            job.weights.append(weight)
            due += _AGEING * weight.seconds
            if not is_light(weight):
                queued.append((self._heavy, index))
            elif self._limits.decode_threads:
                queued.append((self._light, index))
        job.num_undecoded = len(queued)  # before any decoder sees the job
        for queue, index in queued:
            queue.put(due, job, index)
        return bool(queued)

    def give_up(self, job: Job) -> None:
        """Drop the bytes of a job that nobody waits for; those in work are counted until their decoder is done."""
        with self._lock:
            job.is_given_up = True
            job.contents, job.pixels = [], []  # who runs the job keeps the old lists
            self.given_up_bytes += sum(num_bytes for other, num_bytes in self._in_work.values() if other is job)
        self._light.drop(job)
        self._heavy.drop(job)

    def is_stalled(self) -> bool:
        """Whether decoders work on images past their deadline, and none has finished since."""
        since = monotonic() - self._limits.deadline_s
        with self._lock:
            return self._last_decoded < since and any(job.accepted < since for job, _ in self._in_work.values())

    def decode_rest(self, job: Job) -> None:
        """Decode in the caller's thread the images that were not queued."""
        for index, image in enumerate(job.pixels):  # even if the job is given up meanwhile
            if image is None:
                self._decode(job, index)

    def _work(self, queue: ImageQueue, decoder: Decoder | None) -> None:
        while self._decode_next(queue, decoder):
            pass
        if decoder:
            decoder.close()

    def _decode_next(self, queue: ImageQueue, decoder: Decoder | None) -> bool:
        """One image; False at the end. A waiting thread holds no job, and so no model that was swapped out."""
        turn = queue.get()
        if turn is None:
            return False
        job, index = turn
        num_bytes = job.weights[index].num_bytes
        apart = decoder and partial(decoder, max_pixels=self._limits.max_pixels, num_bytes=num_bytes)
        try:
            with self._budget.taken(num_bytes) if decoder else nullcontext():
                self._decode(job, index, apart, num_queued=1)
        except OSError as error:  # the host's budget is a file, and no more can be open
            self._decode(job, index, partial(_fail, error), num_queued=1)
        return True

    def _decode(self, job: Job, index: int, apart: _Decode | None = None, *, num_queued: int = 0) -> None:
        """Decode one image of a job, in this thread or `apart`, and pass on a queued job that is now complete."""
        me = threading.get_ident()
        with self._lock:
            if job.is_given_up:
                return
            content, pixels = job.contents[index], job.pixels
            self._in_work[me] = job, len(content)
            job.num_in_work += 1
            if job.num_in_work == 1:
                job.decode_start = monotonic()
        spec, weight = job.served.model.spec.image, job.weights[index]
        try:
            image = apart(content, spec) if apart else decode(content, spec, max_pixels=weight.width * weight.height)
        except Exception as error:
            if not isinstance(error, Refusal):  # for instance, a process cannot be started
                _log.exception("an image could not be decoded")
            image = without_traceback(error)
        end = monotonic()
        with self._lock:
            _, num_bytes = self._in_work.pop(me)
            if not isinstance(image, TookTooLong):
                self._last_decoded = end
            if job.is_given_up:
                self.given_up_bytes -= num_bytes
                return
            job.num_in_work -= 1
            if not job.num_in_work:  # of images that are decoded at once, no moment counts twice
                job.decode_s += end - job.decode_start
            if isinstance(image, TooManyPixels) and is_light(weight):  # larger than its header said: it is heavy
                job.num_undecoded += 1 - num_queued
                job.weights[index] = Weight(0, 0, self._limits.heavy_bytes, self._limits.decode_s)
                return self._heavy.put(job.accepted + _AGEING * self._limits.decode_s, job, index)
            pixels[index] = image
            job.num_undecoded -= num_queued
            is_complete = num_queued and not job.num_undecoded
        if is_complete:
            self._on_decoded(job)


def _fail(error: Exception, *_: object) -> Decoded:
    raise error


def without_traceback(error: Exception) -> Exception:
    """The exception as a value, without its traceback, whose frames keep the image's bytes alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def warm_up_decoders(spec: ImageSpec) -> None:
    """Decode a pixel in each format, so that Pillow loads its code; not in AVIF, which is never light."""
    for kind in set(FORMATS) - {"AVIF"}:
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, kind)
        decode(file.getvalue(), spec)


def find_problem(images: Sequence[Decoded | None]) -> Exception | None:
    """One problem that names every image that could not be decoded; None if all could."""
    bad = {index: image for index, image in enumerate(images) if isinstance(image, Exception)}
    if not bad:
        return None
    if failed := [error for error in bad.values() if not isinstance(error, Refusal)]:
        return failed[0]
    kind = TOO_MANY_PIXELS if isinstance(next(iter(bad.values())), TooManyPixels) else UNDECODABLE
    if len(images) == 1:
        return Problem(kind, str(bad[0]))
    return Problem(kind, "; ".join(f"image {index + 1} of {len(images)}: {refusal}" for index, refusal in bad.items()))
