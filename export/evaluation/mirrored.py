"""An image answered together with its mirror image."""

from dataclasses import replace
from typing import get_args

import numpy as np

from common.refusal import Refusal
from common.spec import Published
from export.artefacts import Form
from export.runtimes.cascade import Cascade
from train.data import datasets


def mirrored(form: Form) -> Form:
    """`form` with the mean of what it gives for an image and for its mirror image: logits, where it gives those.

    Refuses a model whose training did not mirror images, and a cascade.
    """
    if isinstance(form.answer, Cascade):
        raise Refusal(
            "a cascade keeps float32's class of an image, not that of two logits' mean: leave --flips or --cascade out"
        )
    training = form.provenance.get("training", {})
    dataset, choice = training.get("dataset"), training.get("flip", "auto")
    if choice == "no" or (choice == "auto" and dataset in get_args(Published) and not datasets.info_of(dataset).flip):
        raise Refusal(
            f"{form.path} was not trained on mirror images, which may have another label there: leave --flips out"
        )

    def answer(images: np.ndarray) -> np.ndarray:
        return (form.answer(images) + form.answer(np.ascontiguousarray(images[:, :, ::-1]))) / 2

    return replace(form, answer=answer)
