"""A model proves itself before it answers anybody: at the start, and when its file is read again."""

import asyncio
import logging
import operator
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import numpy as np

from common.difference import difference
from common.refusal import Refusal
from export.compare import TOLERANCES
from export.model_file.probe import NUM_IMAGES, SEED, probe_images
from export.runtimes.cascade import Cascade
from export.runtimes.runtime import Model, Runtime
from serve.request.batcher import Batcher, Served
from serve.request.problems import NOT_COMPARED, Problem

_log = logging.getLogger(__name__)

Load = Callable[[], Sequence[Runtime]]
Made = TypeVar("Made")


class Reloader:
    """Reads the served artefact again. One at a time; requests go on meanwhile, and none is lost."""

    def __init__(self, batcher: Batcher, load: Load, *, max_batch: int) -> None:
        self._batcher = batcher
        self._load = load
        self._max_batch = max_batch
        self._turn = asyncio.Lock()

    async def reload(self) -> Served:
        """Load, check and warm up beside the old model, then swap. Refuses a bad one; the old one goes on.

        The shadow's file is read again too, whatever becomes of this one.
        """
        try:
            return await self._take(self._load, "reading the model's file again")
        finally:
            if shadow := self._batcher.shadow:
                shadow.restart()

    async def promote(self) -> Served:
        """The same with the shadow's file, once it was compared; the old model becomes the shadow."""
        shadow = self._batcher.shadow
        if shadow is None:
            raise Problem(NOT_COMPARED, "no model shadows this one: start the server with --shadow")
        load = partial(shadow.load, shadow.promotable())
        return await self._take(load, "reading the shadow's file to serve it", before=shadow.take_over)

    async def _take(self, load: Load, what: str, before: Callable[[], None] = lambda: None) -> Served:
        """`before` is called when all is ready, and may still refuse."""
        async with self._turn:
            try:
                _log.info(what)
                served = await apart(partial(prepare, load, self._max_batch))
                before()
            except Refusal as refusal:
                _log.error("the old model goes on: %s", refusal)
                raise
            self._batcher.served = served
            _log.warning("now serving %s %s", served.model.name, served.model.digest)
            return served


def prepare(load: Load, max_batch: int) -> Served:
    """A model that has proved itself; refuses any other."""
    runtimes = tuple(load())
    for runtime in runtimes:
        check(runtime)
        warm_up(runtime, max_batch)
    return Served(runtimes)


async def apart(function: Callable[[], Made]) -> Made:
    """What `function` gives in a thread of its own. A process that ends does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Made] = loop.create_future()

    def deliver(outcome: Made | BaseException) -> None:
        if future.done():
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def run() -> None:
        try:
            outcome = function()
        except BaseException as error:
            outcome = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(deliver, outcome)

    threading.Thread(target=run, name="reload", daemon=True).start()
    return await future


def check(runtime: Runtime) -> None:
    """Refuses a model that answers noise wrongly: in shape, with what is no number, or not twice the same.

    Where the file records what it answered when it was exported, that is compared too.
    """
    model = runtime.model
    seed, expected_logits, precision = recorded(model)
    images = probe_images(model.spec.image, seed)
    logits, again = (_run(runtime, images, "its probe images") for _ in range(2))
    expected = (len(images), len(model.spec.labels))
    if logits.shape != expected:
        raise Refusal(f"{model.name} gives {logits.shape[1]} values per image for {expected[1]} labels")
    if not np.isfinite(logits).all():
        raise Refusal(f"{model.name} gives values that are no numbers; export it in a higher precision")
    # Within the tolerance, not bit for bit: kernels of a GPU may add in another order each time.
    tolerance = TOLERANCES[precision or "fp32"]
    if not tolerance.covers(difference(logits, again)):
        raise Refusal(f"{model.name} gives two answers to the same images; its file or this machine is damaged")
    if expected_logits is not None:
        _compare(model.name, precision, expected_logits, logits)


def recorded(model: Model) -> tuple[int, np.ndarray | None, str]:
    """The seed of the probe images, what the net answered to them when it was exported, and its precision."""
    try:
        record = model.provenance.get("export", {})
        probe = record.get("probe", {"seed": SEED})
        seed = operator.index(probe["seed"])
        if "logits" not in probe:
            return abs(seed), None, ""
        logits, precision = np.array(probe["logits"], np.float64), record["precision"]
        if seed < 0 or logits.shape != (NUM_IMAGES, len(model.spec.labels)) or precision not in TOLERANCES:
            raise ValueError(f"seed {seed}, logits {list(logits.shape)}, {precision}")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Refusal(f"the record of the export in {model.name} is damaged ({error!r}); export it again") from error
    return seed, logits, precision


def _run(runtime: Runtime, images: np.ndarray, what: str) -> np.ndarray:
    try:
        return runtime(images)
    except Refusal:
        raise
    except Exception as error:  # a runtime raises its library's own
        _log.exception("the model fails")
        raise Refusal(f"{runtime.model.name} fails on {what} ({type(error).__name__}); export it again") from error


def _compare(name: str, precision: str, recorded: np.ndarray, logits: np.ndarray) -> None:
    found = difference(recorded, logits)
    if not TOLERANCES[precision].covers(found):
        raise Refusal(
            f"{name} answers its probe images {found.relative:.1e} away from what its file recorded "
            f"(tolerance {TOLERANCES[precision]}); export it again"
        )


def warm_up(runtime: Runtime, max_batch: int) -> None:
    """Run each batch size once: first calls allocate and choose kernels. Of a cascade, both forms."""
    if isinstance(runtime, Cascade):
        warm_up(runtime.quick, max_batch)
        return warm_up(runtime.exact, max_batch)
    image = runtime.model.spec.image
    for size in batch_sizes(max_batch):
        _run(runtime, np.zeros((size, image.height, image.width, image.channels), np.uint8), f"{size} black images")


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and `max_batch`."""
    return sorted({*(2**power for power in range(max_batch.bit_length())), max_batch})
