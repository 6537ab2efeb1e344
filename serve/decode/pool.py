"""All images that wait for a decoder: light ones for threads of this process, heavy ones for processes.

A thread cannot be ended, so what one decodes is short by its header. A light image takes 11 µs here and 88 µs in a
process, where a heavy one of seconds costs nothing more, leaves Python's lock free, and can be ended.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from common.image import TooManyPixels
from common.refusal import Refusal
from serve.decode.decode import Decoded, decode_image, kept
from serve.decode.process import Decoder, TookTooLong
from serve.decode.turns import Budget, Turns
from serve.decode.weigh import Weight, is_light, weigh
from serve.request.limits import Limits

if TYPE_CHECKING:
    from serve.request.batcher import Job

_log = logging.getLogger(__name__)
_AGEING = 10.0  # seconds that a job lets lighter ones overtake it, for each second that it takes to decode


class Decoding:
    """Puts the pixels of jobs in place. `on_decoded` learns, in a decoder's thread, of a job that has all of them."""

    def __init__(self, limits: Limits, on_decoded: "Callable[[Job], None]", budget: Budget | None = None) -> None:
        self._limits = limits
        self._on_decoded = on_decoded
        self._light: Turns[Job] = Turns()
        self._heavy: Turns[Job] = Turns()
        self._budget = budget or Budget(limits.heavy_bytes)
        self._decoders = [
            Decoder(limits.decode_s, patience_s=limits.deadline_s) for _ in range(limits.decode_processes)
        ]
        self._threads = [
            *(self._thread(f"decode-{index}", self._decode_light) for index in range(limits.decode_threads)),
            *(
                self._thread(f"decode-heavy-{index}", partial(self._decode_heavy, decoder))
                for index, decoder in enumerate(self._decoders)
            ),
        ]
        self._lock = threading.Lock()  # of all that follows, and of a job's `num_undecoded`
        self._in_work: dict[int, tuple[Job, int]] = {}  # by a decoder's thread: the job, and the bytes of its image
        self._last_decoded = monotonic()
        self.given_up_bytes = 0  # of images in work that nobody waits for any more

    def _thread(self, name: str, decode_next: Callable[[], bool]) -> threading.Thread:
        return threading.Thread(target=_repeat, args=(decode_next,), name=name, daemon=True)

    def start(self) -> None:
        """Decode from now on."""
        for thread in self._threads:
            thread.start()

    def end(self, until: float) -> None:
        """Decode nothing more; what is still under way at the time `until` is ended."""
        for _ in range(self._limits.decode_threads):
            self._light.end()
        for _ in self._decoders:
            self._heavy.end()
        for thread in self._threads:
            thread.join(max(0.0, until - monotonic()))
        for decoder in self._decoders:
            decoder.kill()

    def put(self, job: "Job") -> bool:
        """Queue the images of a job; False where no decoder is needed, but perhaps `decode_rest`."""
        due, queued = job.accepted, []
        for index, content in enumerate(job.contents):
            weight = self._weigh(content, job)
            job.weights.append(weight)
            if isinstance(weight, Exception):
                job.pixels[index] = weight
                continue
            due += _AGEING * weight.seconds
            if not is_light(weight):
                queued.append((self._heavy, index))
            elif self._limits.decode_threads:
                queued.append((self._light, index))
        job.num_undecoded = len(queued)  # before any decoder sees the job
        for turns, index in queued:
            turns.put(due, job, index)
        return bool(queued)

    def give_up(self, job: "Job") -> None:
        """Drop the bytes of a job that nobody waits for; what a decoder works on is counted until it has finished."""
        with self._lock:
            job.is_given_up = True
            job.contents, job.pixels = [], []  # whoever runs the job has the lists that were there
            self.given_up_bytes += sum(num_bytes for other, num_bytes in self._in_work.values() if other is job)
        self._light.drop(job)
        self._heavy.drop(job)

    def is_stalled(self) -> bool:
        """Whether decoders work on what is past its deadline, and none has finished anything since."""
        since = monotonic() - self._limits.deadline_s
        with self._lock:
            return self._last_decoded < since and any(job.accepted < since for job, _ in self._in_work.values())

    def decode_rest(self, job: "Job") -> None:
        """Decode in the thread of the caller what no decoder took."""
        for index, image in enumerate(job.pixels):  # the list that is there now, even if the job is given up meanwhile
            if image is None:
                self._decode(job, index, self._decode_here)

    def _weigh(self, content: bytes, job: "Job") -> Weight | Exception:
        spec = job.served.model.spec.image
        try:
            return weigh(content, spec, max_pixels=self._limits.max_pixels, max_bytes=self._limits.heavy_bytes)
        except Refusal as refusal:
            return kept(refusal)

    def _decode_light(self) -> bool:
        """One image; False at the end. Who waits for it holds no job, and so no model that was swapped out."""
        turn = self._light.get()
        if turn:
            self._decode_queued(*turn, self._decode_here)
        return bool(turn)

    def _decode_heavy(self, decoder: Decoder) -> bool:
        """The same, in a process."""
        turn = self._heavy.get()
        if turn:
            job, index = turn
            with ExitStack() as held:
                try:
                    held.enter_context(self._budget.taken(job.weights[index].num_bytes))  # type: ignore[union-attr]
                except OSError as error:  # the host's budget is a file, and no more can be open
                    _log.exception("an image could not be decoded")
                    failed = kept(error)
                    self._decode_queued(job, index, lambda content, job, index: failed)
                else:
                    self._decode_queued(job, index, partial(self._decode_apart, decoder))
        else:
            decoder.close()
        return bool(turn)

    def _decode_queued(self, job: "Job", index: int, decode: "_Decode") -> None:
        if self._decode(job, index, decode, num_queued=1):
            self._on_decoded(job)

    def _decode(self, job: "Job", index: int, decode: "_Decode", *, num_queued: int = 0) -> bool:
        """Put one image's pixels, or why there are none, in their place; whether a queued job now has all of them."""
        me = threading.get_ident()
        with self._lock:
            if job.is_given_up:
                return False
            content, pixels = job.contents[index], job.pixels
            self._in_work[me] = job, len(content)
        start = monotonic()
        try:
            image = decode(content, job, index)
        except Exception as error:  # a process that cannot be started, for instance: of this job alone
            _log.exception("an image could not be decoded")
            image = kept(error)
        end = monotonic()
        with self._lock:
            _, num_bytes = self._in_work.pop(me)
            if not isinstance(image, TookTooLong):
                self._last_decoded = end
            if job.is_given_up:
                self.given_up_bytes -= num_bytes
                return False
            job.decode_s += end - start
            if isinstance(image, TooManyPixels) and is_light(job.weights[index]):  # type: ignore[arg-type]
                self._queue_anew(job, index, is_counted=bool(num_queued))
                return False
            pixels[index] = image
            job.num_undecoded -= num_queued
            return not job.num_undecoded

    def _queue_anew(self, job: "Job", index: int, *, is_counted: bool) -> None:
        """An image that is larger than its header said is a heavy one."""
        job.num_undecoded += not is_counted
        job.weights[index] = Weight(0, 0, self._limits.heavy_bytes, self._limits.decode_s)
        self._heavy.put(job.accepted + _AGEING * self._limits.decode_s, job, index)

    def _decode_here(self, content: bytes, job: "Job", index: int) -> Decoded:
        width, height, _, _ = job.weights[index]  # type: ignore[misc]
        return decode_image(content, job.served.model.spec.image, max_pixels=width * height)

    def _decode_apart(self, decoder: Decoder, content: bytes, job: "Job", index: int) -> Decoded:
        return decoder(
            content,
            job.served.model.spec.image,
            max_pixels=self._limits.max_pixels,
            num_bytes=job.weights[index].num_bytes,  # type: ignore[union-attr]
        )


_Decode = Callable[[bytes, "Job", int], Decoded]


def _repeat(do_next: Callable[[], bool]) -> None:
    while do_next():
        pass
