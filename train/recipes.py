"""How to train what: hyperparameters as sets, each with where it comes from."""

import math
from dataclasses import dataclass, replace
from typing import Literal

Schedule = Literal["cosine", "wrn", "resnet"]
Start = Literal["pytorch", "authors"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SMALLEST_BATCH = 8  # what batch normalisation needs
MOST_EPOCHS = 100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of the same names in train/config.py.

    The defaults are ours: they reached the best accuracy per minute on two CPU cores; docs/results.md has the numbers.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.2
    momentum: float = 0.9
    nesterov: Literal["yes", "no"] = "yes"
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup: float = 1.0
    label_smoothing: float = 0.0
    a0: float = 1.0
    b0: float = 0.1
    w_std: float = 0.03
    smallest_crop: float = 0.35
    erase: float = 0.0
    start: Start = "pytorch"
    validation: float = 0.1
    precision: Precision = "auto"


OURS = Recipe()
# 1,438 images of 8x8 pixels: small batches take enough steps.
OURS_DIGITS = Recipe(epochs=12, batch_size=32, lr=0.1)
# Section 3 takes them from Wide ResNet, the start is section 2's and 3.3's; where both say nothing, the training
# code of the authors' first release decides. docs/training.md has what still differs from that.
PAPER_CIFAR = Recipe(
    epochs=200,
    lr=0.1,
    nesterov="no",
    schedule="wrn",
    warmup=0.0,
    a0=5.0,
    b0=1e-3,
    w_std=1.0,
    smallest_crop=0.08,
    start="authors",
    validation=0.0,
    precision="fp32",
)
# Section 3.5 says "the same setup as for ResNet training"; the first release's command has these.
PAPER_IMAGENET = replace(PAPER_CIFAR, epochs=100, batch_size=256, weight_decay=1e-4, schedule="resnet")


def recipe(name: str, *, family: str, dataset: str, num_images: int | None = None) -> Recipe:
    """The hyperparameters that `name` ("ours" or "paper") has for a family and a data set.

    Ours follow the number of training images, where it is known: some 40 steps an epoch or more, and 2,000 in all, a
    twentieth of them to warm up. The rate falls with the square root of the batch, as the noise of its gradient grows.
    docs/training.md has what this is worth; random erasing and label smoothing were worth nothing beside it.
    """
    if name == "paper":
        return PAPER_IMAGENET if family.startswith("imagenet") else PAPER_CIFAR
    if dataset == "digits":
        return OURS_DIGITS
    if num_images is None:
        return OURS
    batch_size = min(OURS.batch_size, max(SMALLEST_BATCH, 2 ** int(math.log2(max(1, num_images / 40)))))
    epochs = min(MOST_EPOCHS, max(OURS.epochs, round(2000 / max(1, num_images // batch_size))))
    lr = OURS.lr * math.sqrt(batch_size / OURS.batch_size)
    return replace(OURS, batch_size=batch_size, epochs=epochs, warmup=epochs // 20, lr=lr)
