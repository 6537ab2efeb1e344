"""What an evaluation found, of which model, on which images: report.json, and report.html, one file alone."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from common.interval import percent
from export.evaluation.scores import Calibration, ClassScore, Evaluation, Share

NUM_SHOWN = 48  # of the surest mistakes
NUM_CONFUSIONS = 10
SMALL = 64  # pixels of the longer side up to which an image is kept without loss and shown pixel by pixel


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


def to_html(report: Report, *, confusion_png: bytes, reliability_png: bytes) -> str:
    """The page, with its images inside."""
    template = Template(Path(__file__).with_name("evaluation.html").read_text())
    evaluation, shown = report.evaluation, report.shown
    notes = [f"{evaluation.top1.num:,} {report.what}."]
    if report.unreadable:
        notes.append(f"{len(report.unreadable):,} more could not be read and are in no figure.")
    height, width = shown[0][1].shape[:2] if shown else (1, 1)
    return template.substitute(
        title=_text(report.title),
        model=_text(f"{report.file}, sha256 {report.digest}"),
        notes=_paragraphs(notes),
        cards="\n".join(_cards(evaluation)),
        classes="\n".join(_class_row(score) for score in weakest_first(evaluation.classes)),
        confusions=_confusions(evaluation),
        calibration=_paragraphs(describe_calibration(evaluation)),
        mistakes=_mistakes(len(report.mistakes), shown),
        confusion_png=_data_url(confusion_png, "png"),
        reliability_png=_data_url(reliability_png, "png"),
        aspect=f"{width} / {height}",
        rendering="pixelated" if max(height, width) <= SMALL else "auto",
    )


def weakest_first(classes: Sequence[ClassScore]) -> list[ClassScore]:
    """By recall; classes without an image come last."""
    return sorted(classes, key=lambda score: (not score.images, score.recall.value or 0.0))


def describe_calibration(evaluation: Evaluation) -> list[str]:
    """In words, what the reliability diagram shows and what so few images can show."""
    calibration, right = evaluation.calibration, evaluation.top1.value or 0.0
    gap = calibration.confidence - right
    lines = [
        f"An answer of probability p should be right in a share p of all cases. Expected calibration error: "
        f"{describe_error(evaluation)}, the mean distance between the two over {len(calibration.bins)} bins. "
        f"On as many images a model whose probabilities hold shows {share(calibration.perfect)}, "
        f"and 95 % of such models show less than {share(calibration.perfect_95)}.",
        f"The mean probability of the answers is {share(calibration.confidence)}, "
        f"and {share(right)} of them are right: ",
    ]
    lines[1] += _in_words(calibration, gap)
    return lines


def _in_words(calibration: Calibration, gap: float) -> str:
    if calibration.error <= calibration.perfect_95:
        return "so many images show no error beyond chance."
    if abs(gap) < calibration.error / 2:
        return "too sure in some bins, not sure enough in others."
    return "the model is surer than it is right." if gap > 0 else "the model is right more often than it is sure."


def _cards(evaluation: Evaluation) -> list[str]:
    calibration = evaluation.calibration
    num = f"{evaluation.top1.hits:,} of {evaluation.top1.num:,}"
    cards = [("top-1 accuracy", share(evaluation.top1.value), f"[{percent(evaluation.top1.interval)}], {num}")]
    if evaluation.top5:
        cards.append(("top-5 accuracy", share(evaluation.top5.value), f"[{percent(evaluation.top5.interval)}]"))
    cards += [
        ("mean recall of the classes", share(evaluation.mean_recall), "the accuracy if all were equally frequent"),
        ("mean F1 of the classes", share(evaluation.mean_f1), "classes without images left out"),
        ("calibration error, expected", share(calibration.error), f"by chance up to {share(calibration.perfect_95)}"),
    ]  # fmt: skip
    return [
        f'<div class="card"><dt>{name}</dt><dd>{value}</dd><dd>{_text(note)}</dd></div>' for name, value, note in cards
    ]


def _class_row(score: ClassScore) -> str:
    f1 = "–" if score.f1 is None else f"{share(score.f1)}<small>[{percent(score.f1_interval)}]</small>"
    return (
        f"<tr><th>{_text(score.label)}</th><td>{_cell(score.recall)}</td><td>{_cell(score.precision)}</td>"
        f"<td>{f1}</td><td>{score.images:,}</td><td>{score.answered:,}</td></tr>"
    )


def _cell(value: Share) -> str:
    return "–" if value.value is None else f"{share(value.value)}<small>[{percent(value.interval)}]</small>"


def _confusions(evaluation: Evaluation) -> str:
    rows = evaluation.confusions(NUM_CONFUSIONS)
    if not rows:
        return "<p>No image is taken for another class.</p>"
    images = {score.label: score.images for score in evaluation.classes}
    lines = [
        f"<tr><th>{_text(truth)}</th><td>{_text(answer)}</td><td>{count:,} of {images[truth]:,}</td></tr>"
        for truth, answer, count in rows
    ]
    return (
        '<p>The most frequent mistakes.</p><div class="wide"><table class="text"><thead><tr><th>truth</th>'
        f"<th>answer</th><th>images</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _mistakes(num: int, shown: Sequence[tuple[Mistake, np.ndarray]]) -> str:
    if not num:
        return "<p>No answer is wrong.</p>"
    count = f"All {num:,} wrong answers" if num == len(shown) else f"{len(shown)} of {num:,} wrong answers"
    cells = "".join(_figure(mistake, pixels) for mistake, pixels in shown)
    return (
        f"<p>{count}, the surest first. A label that is wrong in the data set often shows here.</p>"
        f'<div class="mistakes">{cells}</div>'
    )


def _figure(mistake: Mistake, pixels: np.ndarray) -> str:
    return (
        f'<figure><img alt="" loading="lazy" src="{_image_url(pixels)}"><figcaption>'
        f"called <b>{_text(mistake.answer)}</b>, {mistake.probability:.1%}<br>"
        f"is <b>{_text(mistake.truth)}</b>, {mistake.of_truth:.1%}<br>"
        f'<span class="muted">{_text(mistake.image)}</span></figcaption></figure>'
    )


def _image_url(pixels: np.ndarray) -> str:
    """Small images without loss, larger ones as JPEG."""
    is_small = max(pixels.shape[:2]) <= SMALL
    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.save(file, format="PNG" if is_small else "JPEG", **({} if is_small else {"quality": 85}))
    return _data_url(file.getvalue(), "png" if is_small else "jpeg")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _paragraphs(lines: Sequence[str]) -> str:
    return "\n".join(f"<p>{_text(line)}</p>" for line in lines)


def _text(text: str) -> str:
    """For HTML; bytes of a file's name that are not UTF-8 become question marks."""
    return escape(text.encode(errors="replace").decode())
