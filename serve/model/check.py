"""A model is checked before it serves: at the start, and when its file is read again."""

import asyncio
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from common.difference import difference
from common.refusal import Refusal
from export.compare import TOLERANCES, Tolerance
from export.model_file.probe import NUM_IMAGES, SEED, probe_images
from export.runtimes.cascade import Cascade
from export.runtimes.runtime import Model, Runtime
from serve.request.batcher import Batcher, soon
from serve.request.job import Served
from serve.request.problems import NOT_COMPARED, Problem

_log = logging.getLogger(__name__)

LoadModel = Callable[[], Sequence[Runtime]]
Made = TypeVar("Made")


class Reloader:
    """Reads the served file again, one reload at a time. Requests continue meanwhile, and none is lost."""

    def __init__(self, batcher: Batcher, load: LoadModel, *, max_batch: int) -> None:
        self._batcher = batcher
        self._load = load
        self._max_batch = max_batch
        self._turn = asyncio.Lock()

    async def reload(self) -> Served:
        """Load, check and warm up beside the old model, then swap. Refuses a bad model; the old one keeps serving.

        The shadow's file is read again too, even if this one is refused.
        """
        try:
            return await self._take(self._load, "reading the model's file again")
        finally:
            if shadow := self._batcher.shadow:
                shadow.restart()

    async def promote(self) -> Served:
        """The same with the shadow's file, once it was compared. The old model becomes the shadow."""
        shadow = self._batcher.shadow
        if shadow is None:
            raise Problem(NOT_COMPARED, "no model shadows this one: start the server with --shadow")
        load = partial(shadow.load, shadow.promotable())
        return await self._take(load, "reading the shadow's file to serve it", before=shadow.take_over)

    async def _take(self, load: LoadModel, what: str, before: Callable[[], None] = lambda: None) -> Served:
        def swap(served: Served) -> None:
            before()
            self._batcher.served = served

        async with self._turn:
            return await take_model(load, self._max_batch, swap, what)


async def take_model(load: LoadModel, max_batch: int, swap: Callable[[Served], None], what: str) -> Served:
    """Load, check and warm up a model in a thread, and `swap` to it, which may refuse it too."""
    try:
        _log.info(what)
        served = await in_daemon_thread(partial(_prepare, load, max_batch))
        swap(served)
    except Refusal as refusal:
        _log.error("the old model keeps serving: %s", refusal)
        raise
    _log.warning("now serving %s %s", served.model.name, served.model.digest)
    return served


def _prepare(load: LoadModel, max_batch: int) -> Served:
    """A model, checked and warmed up."""
    runtimes = tuple(load())
    for runtime in runtimes:
        check(runtime)
    warm_up(runtimes, max_batch)
    return Served(runtimes)


async def in_daemon_thread(function: Callable[[], Made]) -> Made:
    """The result of `function`; its thread does not delay the end of the process.

    `asyncio.wrap_future` would keep the result, a model, in a reference cycle.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Made] = loop.create_future()

    def finish(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            outcome = future.set_result, function()
        except BaseException as error:
            outcome = future.set_exception, error
        soon(loop, finish, *outcome)

    threading.Thread(target=run, name="reload", daemon=True).start()
    return await future


@dataclass(frozen=True)
class Probe:
    """Images of noise, and the net's logits of them at export, if its file records them."""

    images: np.ndarray
    logits: np.ndarray | None
    tolerance: Tolerance


def check(runtime: Runtime) -> None:
    """Refuses a model whose answers to noise have a wrong shape, are not finite, or are not reproducible.

    If the file records the answers at export, they are compared too.
    """
    model, probe = runtime.model, read_probe(runtime.model)
    logits, again = (_run(runtime, probe.images, "its probe images") for _ in range(2))
    expected = (len(probe.images), len(model.spec.labels))
    if logits.shape != expected:
        raise Refusal(f"{model.name} gives {logits.shape[1]} values per image for {expected[1]} labels")
    if not np.isfinite(logits).all():
        raise Refusal(f"{model.name} gives values that are not finite; export it in a higher precision")
    # Not bit for bit, because GPU kernels may add in another order each time.
    if not probe.tolerance.covers(difference(logits, again)):
        raise Refusal(f"{model.name} gives two answers to the same images; its file or this machine is damaged")
    if probe.logits is None:
        return
    found = difference(probe.logits, logits)
    if not probe.tolerance.covers(found):
        raise Refusal(
            f"{model.name} answers its probe images {found.relative:.1e} away from what its file recorded "
            f"(tolerance {probe.tolerance}); export it again"
        )


def read_probe(model: Model) -> Probe:
    """The record in the model's provenance; refuses one that is damaged."""
    try:
        record = model.provenance.get("export", {})
        probe = record.get("probe", {"seed": SEED})
        seed = operator.index(probe["seed"])
        if "logits" not in probe:
            return Probe(probe_images(model.spec.image, abs(seed)), None, TOLERANCES["fp32"])
        logits, precision = np.array(probe["logits"], np.float64), record["precision"]
        if seed < 0 or logits.shape != (NUM_IMAGES, len(model.spec.labels)) or precision not in TOLERANCES:
            raise ValueError(f"seed {seed}, logits {list(logits.shape)}, {precision}")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Refusal(f"the record of the export in {model.name} is damaged ({error!r}); export it again") from error
    return Probe(probe_images(model.spec.image, seed), logits, TOLERANCES[precision])


def _run(runtime: Runtime, images: np.ndarray, what: str) -> np.ndarray:
    try:
        return runtime(images)
    except Refusal:
        raise
    except Exception as error:  # libraries raise their own
        _log.exception("the model fails")
        raise Refusal(f"{runtime.model.name} fails on {what} ({type(error).__name__}); export it again") from error


def warm_up(runtimes: Iterable[Runtime], max_batch: int) -> None:
    """Run each batch size once, because first calls allocate and choose kernels; in a cascade, with both forms."""
    for runtime in runtimes:
        if isinstance(runtime, Cascade):
            warm_up((runtime.quick, runtime.exact), max_batch)
            continue
        for size in batch_sizes(max_batch):
            black = np.zeros((size, *runtime.model.spec.image.shape), np.uint8)
            _run(runtime, black, f"{size} black images")


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and `max_batch`."""
    return sorted({*(2**power for power in range(max_batch.bit_length())), max_batch})
