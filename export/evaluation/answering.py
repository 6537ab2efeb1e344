"""Any number of images answered one after the other: decoded by threads, a batch ahead of the net."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar, get_args

import numpy as np

from common.cores import num_cores
from common.refusal import Refusal
from common.spec import Published
from export.artefacts import Artefact
from export.runtimes.cascade import Cascade
from export.runtimes.probabilities import probabilities
from train.data import datasets

BATCH_SIZE = 32  # as the server's; the pixels of two batches are in memory at once

Item = TypeVar("Item")


def answer_each(
    form: Artefact, items: Sequence[Item], load: Callable[[Item], np.ndarray]
) -> Iterator[np.ndarray | Refusal]:
    """In the order of `items`: probabilities float64 [K], or why there are none.

    `load` gives an item's pixels uint8 [H, W, C] or raises a `Refusal`; it is called from several threads.
    """
    with ThreadPoolExecutor(num_cores()) as pool:

        def submit(start: int) -> list[Future[np.ndarray]]:
            return [pool.submit(load, item) for item in items[start : start + BATCH_SIZE]]

        try:
            ahead = submit(0)
            for start in range(0, len(items), BATCH_SIZE):
                batch, ahead = ahead, submit(start + BATCH_SIZE)
                yield from _answer(form, batch)
        finally:
            pool.shutdown(cancel_futures=True)


def mirrored(form: Artefact) -> Artefact:
    """`form` with the mean of what it gives for an image and for its mirror image: logits, where it gives those.

    Refuses a model whose training did not mirror images, and a cascade.
    """
    if isinstance(form.answer, Cascade):
        raise Refusal("a cascade keeps float32's class of one image, not of two: leave --flips or --cascade out")
    training = form.provenance.get("training", {})
    dataset, choice = training.get("dataset"), training.get("flip", "auto")
    if choice == "no" or (choice == "auto" and dataset in get_args(Published) and not datasets.info_of(dataset).flip):
        raise Refusal(f"{form.path} was not trained on mirror images, which may have other labels: leave --flips out")

    def answer(images: np.ndarray) -> np.ndarray:
        return (form.answer(images) + form.answer(np.ascontiguousarray(images[:, :, ::-1]))) / 2

    return replace(form, answer=answer)


def _answer(form: Artefact, batch: list[Future[np.ndarray]]) -> Iterator[np.ndarray | Refusal]:
    images = [future.result() for future in batch if not isinstance(future.exception(), Refusal)]
    rows = iter(form.answer(np.stack(images)) if images else ())
    for future in batch:
        if isinstance(refusal := future.exception(), Refusal):
            yield refusal
        elif np.isfinite(row := next(rows)).all():
            yield probabilities(
                row[None], temperature=form.spec.temperature, are_probabilities=form.gives_probabilities
            )[0]
        else:
            yield Refusal("the model answers with values that are not numbers")
