"""An evaluation as a report: on the screen, as report.json, and as report.html, one file alone."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from common.interval import percent
from common.progress import make_table, printable
from export.artefacts import Artefact
from export.evaluation import figures
from export.evaluation.answering import Judged, answer_judged
from export.evaluation.scores import ClassScore, Evaluation, evaluate
from export.runtimes.runtime import best

NUM_SHOWN, NUM_DRAWN = 48, 24  # of the surest mistakes, in the page and in mistakes.png
NUM_CONFUSIONS = 10
NUM_LISTED, NUM_NAMED = 10, 20  # classes and unreadable images on the screen; the report has all
ENLARGED = 160  # pixels of the shorter side of an image that is shown, if its file has them
SMALL = 64  # pixels of the longer side up to which an image is kept without loss and shown pixel by pixel


@dataclass(frozen=True)
class Mistake:
    """An image whose answer is wrong."""

    image: str
    truth: str
    answer: str
    probability: float  # of the answer
    of_truth: float  # the probability of the true class


@dataclass(frozen=True)
class Report:
    form: Artefact
    judged: Judged
    evaluation: Evaluation
    mistakes: tuple[Mistake, ...]  # all of them, the surest first
    pixels: tuple[np.ndarray, ...]  # uint8 [H, W, C] of the first NUM_SHOWN of these
    unreadable: dict[str, str]  # name of an image → why there is no answer

    @property
    def title(self) -> str:
        return f"{self.form.name} on {self.evaluation.top1.num:,} images"

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": {"name": self.form.name, "file": self.form.file_name, "digest": self.form.digest},
            "images": {"dataset": self.judged.dataset, "num": self.evaluation.top1.num, "what": self.judged.what},
            **self.evaluation.to_dict(),
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
            "unreadable": self.unreadable,
        }


def evaluate_form(form: Artefact, judged: Judged, console: Console) -> tuple[Report, np.ndarray]:
    """The report, and the probabilities [N, K] of the images that could be read."""
    probabilities, places, unreadable = answer_judged(form, judged, console)
    targets, labels = judged.targets[places], form.spec.labels
    answers = best(probabilities, 1)[:, 0]
    wrong = np.flatnonzero(answers != targets)
    wrong = wrong[np.argsort(-probabilities[wrong, answers[wrong]], kind="stable")]
    mistakes = [
        Mistake(
            image=judged.name(places[row]),
            truth=labels[targets[row]],
            answer=labels[answers[row]],
            probability=float(probabilities[row, answers[row]]),
            of_truth=float(probabilities[row, targets[row]]),
        )
        for row in wrong
    ]
    pixels = tuple(judged.pixels(places[row], shorter_side=ENLARGED) for row in wrong[:NUM_SHOWN])
    evaluation = evaluate(probabilities, targets, labels, temperature=form.spec.temperature)
    return Report(form, judged, evaluation, tuple(mistakes), pixels, unreadable), probabilities


def share(value: float | None) -> str:
    """In per cent; a dash if there are no images."""
    return "–" if value is None else f"{100 * value:.2f} %"


def describe_error(evaluation: Evaluation) -> str:
    """The expected calibration error, and what it would be without the temperature."""
    plain, error = evaluation.without_temperature, share(evaluation.calibration.error)
    if plain is None:
        return error
    return f"{error} ({share(plain.error)} without the temperature of {evaluation.temperature:.3g})"


def describe_calibration(evaluation: Evaluation) -> list[str]:
    """In words, what the reliability diagram shows and what so few images can show."""
    calibration, right = evaluation.calibration, evaluation.top1.value or 0.0
    gap = calibration.confidence - right
    if calibration.error <= calibration.perfect_95:
        verdict = "so many images show no error beyond chance."
    elif abs(gap) < calibration.error / 2:
        verdict = "too sure in some bins, not sure enough in others."
    else:
        verdict = f"the model is {'surer than it is right' if gap > 0 else 'right more often than it is sure'}."
    return [
        f"An answer of probability p should be right in a share p of all cases. Expected calibration error: "
        f"{describe_error(evaluation)}, the mean distance between the two over {len(calibration.bins)} bins. "
        f"On as many images a model whose probabilities hold shows {share(calibration.perfect)}, "
        f"and 95 % of such models show less than {share(calibration.perfect_95)}.",
        f"The mean probability of the answers is {share(calibration.confidence)}, "
        f"and {share(right)} of them are right: {verdict}",
    ]


def print_summary(console: Console, report: Report) -> None:
    """The figures, the weakest classes, the most frequent mistakes, and the images that could not be read."""
    evaluation = report.evaluation
    console.print(f"{report.form.name} on {evaluation.top1.num:,} {report.judged.what}")
    for name, value in (("top-1", evaluation.top1), ("top-5", evaluation.top5)):
        if value:
            console.print(f"{name} {share(value.value)}, 95 % interval {percent(value.interval)}")
    console.print(
        f"expected calibration error {describe_error(evaluation)}; "
        f"on as many images chance alone makes up to {share(evaluation.calibration.perfect_95)}"
    )
    table = make_table("class", "images", "recall", "95 % interval", "precision", "95 % interval", "F1")
    for row in _weakest_first(evaluation)[:NUM_LISTED]:
        parts = [text for part in (row.recall, row.precision) for text in (share(part.value), percent(part.interval))]
        table.add_row(printable(row.label), str(row.images), *parts, share(row.f1.value))
    console.print(table)
    if len(evaluation.labels) > NUM_LISTED:
        console.print(f"these are the {NUM_LISTED} of {len(evaluation.labels)} classes that are recognised least often")
    for truth, answer, count in evaluation.confusions(3):
        console.print(printable(f"{count} of {truth} taken for {answer}"))
    for name, why in list(report.unreadable.items())[:NUM_NAMED]:
        console.print(printable(f"not answered: {name}: {why}"))
    if report.unreadable:
        console.print(f"{len(report.unreadable):,} images could not be read and are in no figure")


def report_files(report: Report) -> dict[str, bytes]:
    """Name → content; the page is the last, so that it is written when all others are."""
    evaluation, top1 = report.evaluation, report.evaluation.top1
    title = figures.figure_text(report.title, 80)
    score = f"{share(top1.value)} right, 95 % interval {percent(top1.interval)}"
    error = f"expected calibration error {describe_error(evaluation)}"
    captions = [
        f"{figures.figure_text(mistake.answer)} {mistake.probability:.1%}\nis {figures.figure_text(mistake.truth)}"
        for mistake in report.mistakes[:NUM_DRAWN]
    ]
    num = len(report.mistakes)
    surest = f"{len(captions)} of {num:,} wrong answers, the surest first" if num else "no answer is wrong"
    pictures = {
        "confusion.png": figures.confusion_figure(evaluation, f"{title}\n{score}"),
        "reliability.png": figures.reliability_figure(evaluation, f"{title}\n{error}"),
        "mistakes.png": figures.mistakes_figure(report.pixels[:NUM_DRAWN], captions, surest),
    }
    files = {name: figures.draw(figure) for name, figure in pictures.items()}
    record = (json.dumps(report.to_dict(), indent=1) + "\n").encode()
    return {**files, "report.json": record, "report.html": _page(report, files).encode()}


def _weakest_first(evaluation: Evaluation) -> list[ClassScore]:
    """By recall; classes without an image come last."""
    return sorted(evaluation.classes, key=lambda score: (not score.images, score.recall.value or 0.0))


def _page(report: Report, pictures: dict[str, bytes]) -> str:
    template = Template(Path(__file__).with_name("evaluation.html").read_text())
    notes = [f"{report.evaluation.top1.num:,} {report.judged.what}."]
    if report.unreadable:
        notes.append(f"{len(report.unreadable):,} more could not be read and are in no figure.")
    height, width = report.pixels[0].shape[:2] if report.pixels else (1, 1)
    return template.substitute(
        title=_text(report.title),
        model=_text(f"{report.form.file_name}, sha256 {report.form.digest}"),
        notes=_paragraphs(notes),
        cards="\n".join(_cards(report.evaluation)),
        classes="\n".join(map(_class_row, _weakest_first(report.evaluation))),
        confusions=_confusions(report.evaluation),
        calibration=_paragraphs(describe_calibration(report.evaluation)),
        mistakes=_mistakes(report),
        confusion_png=_data_url(pictures["confusion.png"], "png"),
        reliability_png=_data_url(pictures["reliability.png"], "png"),
        aspect=f"{width} / {height}",
        rendering="pixelated" if max(height, width) <= SMALL else "auto",
    )


def _cards(evaluation: Evaluation) -> list[str]:
    top1, top5, calibration = evaluation.top1, evaluation.top5, evaluation.calibration
    top1_note = f"[{percent(top1.interval)}], {top1.hits:,} of {top1.num:,}"
    cards = [
        ("top-1 accuracy", top1.value, top1_note),
        *([("top-5 accuracy", top5.value, f"[{percent(top5.interval)}]")] if top5 else []),
        ("mean recall of the classes", evaluation.mean_recall, "the accuracy if all were equally frequent"),
        ("mean F1 of the classes", evaluation.mean_f1, "classes without images left out"),
        ("calibration error, expected", calibration.error, f"by chance up to {share(calibration.perfect_95)}"),
    ]
    return [
        f'<div class="card"><dt>{name}</dt><dd>{share(value)}</dd><dd>{_text(note)}</dd></div>'
        for name, value, note in cards
    ]


def _class_row(score: ClassScore) -> str:
    cells = "".join(
        f"<td>{'–' if part.value is None else f'{share(part.value)}<small>[{percent(part.interval)}]</small>'}</td>"
        for part in (score.recall, score.precision, score.f1)
    )
    return f"<tr><th>{_text(score.label)}</th>{cells}<td>{score.images:,}</td><td>{score.answered:,}</td></tr>"


def _confusions(evaluation: Evaluation) -> str:
    images = {score.label: score.images for score in evaluation.classes}
    rows = "".join(
        f"<tr><th>{_text(truth)}</th><td>{_text(answer)}</td><td>{count:,} of {images[truth]:,}</td></tr>"
        for truth, answer, count in evaluation.confusions(NUM_CONFUSIONS)
    )
    if not rows:
        return "<p>No image is taken for another class.</p>"
    return (
        '<p>The most frequent mistakes.</p><div class="wide"><table class="text"><thead><tr><th>truth</th>'
        f"<th>answer</th><th>images</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _mistakes(report: Report) -> str:
    num, num_shown = len(report.mistakes), len(report.pixels)
    if not num:
        return "<p>No answer is wrong.</p>"
    count = f"All {num:,} wrong answers" if num == num_shown else f"{num_shown} of {num:,} wrong answers"
    cells = "".join(
        f'<figure><img alt="" loading="lazy" src="{_image_url(pixels)}"><figcaption>'
        f"called <b>{_text(mistake.answer)}</b>, {mistake.probability:.1%}<br>"
        f"is <b>{_text(mistake.truth)}</b>, {mistake.of_truth:.1%}<br>"
        f'<span class="muted">{_text(mistake.image)}</span></figcaption></figure>'
        for mistake, pixels in zip(report.mistakes, report.pixels, strict=False)
    )
    return (
        f"<p>{count}, the surest first. A label that is wrong in the data set often shows here.</p>"
        f'<div class="mistakes">{cells}</div>'
    )


def _image_url(pixels: np.ndarray) -> str:
    """Small images without loss, larger ones as JPEG."""
    kind, options = ("png", {}) if max(pixels.shape[:2]) <= SMALL else ("jpeg", {"quality": 85})
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format=kind, **options)
    return _data_url(file.getvalue(), kind)


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _paragraphs(lines: Sequence[str]) -> str:
    return "\n".join(f"<p>{_text(line)}</p>" for line in lines)


def _text(text: str) -> str:
    """For HTML; bytes of a file's name that are not UTF-8 become question marks."""
    return escape(text.encode(errors="replace").decode())
