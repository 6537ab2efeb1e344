"""How to train what: hyperparameters as sets, each with where it comes from."""

import math
from dataclasses import dataclass, replace
from typing import Literal

Schedule = Literal["cosine", "wrn", "resnet"]
Start = Literal["pytorch", "authors"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """See the options of the same names in train/config.py."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    nesterov: Literal["yes", "no"]
    weight_decay: float
    schedule: Schedule
    warmup: float
    label_smoothing: float
    a0: float
    b0: float
    w_std: float
    smallest_crop: float
    erase: float
    start: Start = "pytorch"
    validation: float = 0.1
    precision: Precision = "auto"


# The values that reached the best accuracy per minute on two CPU cores; docs/results.md has the numbers.
OURS = Recipe(
    epochs=30,
    batch_size=128,
    lr=0.2,
    momentum=0.9,
    nesterov="yes",
    weight_decay=5e-4,
    schedule="cosine",
    warmup=1.0,
    label_smoothing=0.0,
    a0=1.0,
    b0=0.1,
    w_std=0.03,
    smallest_crop=0.35,
    erase=0.0,
)
SMALLEST_BATCH = 8  # what batch normalisation needs
MOST_EPOCHS = 100
# 1,438 images of 8x8 pixels: small batches take enough steps.
OURS_DIGITS = replace(OURS, epochs=12, batch_size=32, lr=0.1)
# Section 3 takes them from Wide ResNet, the start is section 2's and 3.3's; where both say nothing, the training
# code of the authors' first release decides. docs/training.md has what still differs from that.
PAPER_CIFAR = Recipe(
    epochs=200,
    batch_size=128,
    lr=0.1,
    momentum=0.9,
    nesterov="no",
    weight_decay=5e-4,
    schedule="wrn",
    warmup=0.0,
    label_smoothing=0.0,
    a0=5.0,
    b0=1e-3,
    w_std=1.0,
    smallest_crop=0.08,
    erase=0.0,
    start="authors",
    validation=0.0,
    precision="fp32",
)
# Section 3.5 says "the same setup as for ResNet training"; the first release's command has these.
PAPER_IMAGENET = replace(PAPER_CIFAR, epochs=100, batch_size=256, weight_decay=1e-4, schedule="resnet")


def recipe(name: str, *, family: str, dataset: str, num_images: int | None = None) -> Recipe:
    """The hyperparameters that `name` ("ours" or "paper") has for a family and a data set.

    Ours follow the number of training images, where it is known.
    """
    if name == "paper":
        return PAPER_IMAGENET if family.startswith("imagenet") else PAPER_CIFAR
    if dataset == "digits":
        return OURS_DIGITS
    return OURS if num_images is None else _for_images(OURS, num_images)


def _for_images(most: Recipe, num: int) -> Recipe:
    """`most` for `num` images: some 40 steps an epoch or more, and 2,000 in all, a twentieth of them to warm up.

    The rate falls with the square root of the batch, as the noise of its gradient grows. docs/training.md has what it
    is worth, and that random erasing and label smoothing were not worth anything beside it.
    """
    batch_size = min(most.batch_size, max(SMALLEST_BATCH, 2 ** int(math.log2(max(1, num / 40)))))
    num_steps = max(1, num // batch_size)
    epochs = min(MOST_EPOCHS, max(most.epochs, round(2000 / num_steps)))
    return replace(
        most,
        batch_size=batch_size,
        epochs=epochs,
        warmup=epochs // 20,
        lr=most.lr * math.sqrt(batch_size / most.batch_size),
    )
