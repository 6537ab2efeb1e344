"""What an evaluation found, of which model, on which images: what report.json and report.html are made of."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from common.interval import percent
from export.evaluation.scores import Evaluation

NUM_SHOWN = 48  # of the surest mistakes


@dataclass(frozen=True)
class Mistake:
    """An image whose answer is wrong; `pixels` uint8 [H, W, C] where it is shown."""

    image: str
    truth: str
    answer: str
    probability: float  # of the answer
    of_truth: float  # the probability of the true class
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class Report:
    model: str
    file: str
    digest: str  # sha256 of the file
    dataset: str
    what: str  # which images, in words
    evaluation: Evaluation
    mistakes: tuple[Mistake, ...]  # all of them, the surest first; the first NUM_SHOWN have pixels
    unreadable: dict[str, str]  # name of an image → why there is no answer

    @property
    def title(self) -> str:
        return f"{self.model} on {self.evaluation.top1.num:,} images"

    @property
    def score(self) -> str:
        top1 = self.evaluation.top1
        return f"{share(top1.value)} right, 95 % interval {percent(top1.interval)}"

    @property
    def shown(self) -> list[tuple[Mistake, np.ndarray]]:
        return [(mistake, mistake.pixels) for mistake in self.mistakes if mistake.pixels is not None]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": {"name": self.model, "file": self.file, "digest": self.digest},
            "images": {"dataset": self.dataset, "num": self.evaluation.top1.num, "what": self.what},
            **self.evaluation.to_dict(),
            "mistakes": [
                {name: value for name, value in asdict(replace(mistake, pixels=None)).items() if name != "pixels"}
                for mistake in self.mistakes
            ],
            "unreadable": self.unreadable,
        }


def describe_error(evaluation: Evaluation) -> str:
    """The expected calibration error, and what it would be without the temperature."""
    plain, error = evaluation.without_temperature, share(evaluation.calibration.error)
    return (
        error
        if plain is None
        else f"{error} ({share(plain.error)} without the temperature of {evaluation.temperature:.3g})"
    )


def share(value: float | None) -> str:
    """In per cent; a dash of no images."""
    return "–" if value is None else f"{100 * value:.2f} %"
