"""python export/evaluate.py MODEL: how good a model is on images that it was not trained on, as a report."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal
from common.spec import DatasetName
from export.model_file.reading import ReadingFlags, from_flags

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from export.artefacts import Artefact
    from export.evaluation.judged import Judged
    from export.evaluation.report import Mistake, Report
    from export.evaluation.scores import Evaluation

EXAMPLES = (
    "python export/evaluate.py runs/photos/plain.onnx --data-dir photos     # the test images of its run",
    "python export/evaluate.py models/fashion-mnist.onnx --out report",
    "python export/evaluate.py models/fashion-mnist.onnx --cascade models/fashion-mnist-int8.onnx",
    "python export/evaluate.py plain.onnx --store-reference      # so that the server tells drift",
    "python export/evaluate.py theirs.onnx --data-dir photos --labels names.txt --resize 256      # all images there",
)
NUM_DRAWN = 24  # of the surest mistakes in mistakes.png
NUM_LISTED, NUM_NAMED = 10, 20  # classes and unreadable images on the screen; the report has all


@dataclass(frozen=True)
class EvaluateConfig(ReadingFlags):
    model: Annotated[Path, "checkpoint.pt, plain.safetensors, plain.onnx, plain.engine, or another ONNX classifier"]
    dataset: Annotated[DatasetName | None, "what to judge it on (default: the test images of its run)"] = None
    data_dir: Annotated[Path | None, "where the data set lies; a folder without a run's record is taken whole"] = None
    out: Annotated[Path, "folder for report.html, report.json, confusion.png, reliability.png, mistakes.png"] = Path(
        "report"
    )
    flips: Annotated[bool, "answer each image together with its mirror image: the mean of both logits"] = False
    cascade: Annotated[
        Path | None, "the other form of an fp32 or int8 model: int8 answers, and fp32 where that is in doubt"
    ] = None
    store_reference: Annotated[
        bool, "count the answers in the model's own file, .onnx or card of an .engine, for the server to compare with"
    ] = False
    json: Annotated[bool, "print report.json on stdout"] = False

    def __post_init__(self) -> None:
        if self.flips and self.store_reference:
            raise Refusal(
                "--store-reference counts what the server will answer, which mirrors no image: leave out --flips"
            )


def command(config: EvaluateConfig) -> int:
    """Judge a model on images whose classes are known; exit status 1 if one of them could not be read.

    A model of this project is judged on the test images that its run recorded, and on no other image of that folder.
    """
    import json
    from dataclasses import replace
    from functools import partial

    from common.files import write_whole
    from common.progress import make_console, printable, track
    from export.artefacts import open_artefact
    from export.evaluation.answering import mirrored
    from export.evaluation.judged import find_judged
    from export.evaluation.report import Report
    from export.evaluation.scores import evaluate
    from export.metadata import refuse_what_takes_none, store_reference
    from export.runtimes.cascade import Cascade

    if config.store_reference and config.cascade:
        raise Refusal("--store-reference is for one file, and --cascade judges two; leave one of them out")
    if config.store_reference:
        refuse_what_takes_none(config.model)
    console = make_console(json=config.json)
    form = open_artefact(config.model, hints=from_flags(config), cascade=config.cascade)
    if form.reading:
        console.print(f"{form.name}: {form.reading}")
    judged = find_judged(form, dataset=config.dataset, data_dir=config.data_dir, track=partial(track, console))
    if config.flips:
        form, judged = mirrored(form), replace(judged, what=f"{judged.what}, each with its mirror image")
    probabilities, places, unreadable = _answers(form, judged, console)
    targets, labels = judged.targets[places], form.spec.labels
    report = Report(
        model=form.model_name,
        file=form.file_name,
        digest=form.digest,
        dataset=judged.dataset,
        what=judged.what,
        evaluation=evaluate(probabilities, targets, labels, temperature=form.spec.temperature),
        mistakes=_mistakes(judged, probabilities, targets, places, labels),
        unreadable=unreadable,
    )
    for name, content in _files(report).items():
        write_whole(config.out / name, content)
    _print_summary(console, report)
    if isinstance(form.answer, Cascade):
        console.print(form.answer.counted)
    console.print(f"wrote {config.out / 'report.html'}, report.json, confusion.png, reliability.png and mistakes.png")
    if config.store_reference:
        for line in store_reference(config.model, probabilities, what=judged.what):
            console.print(printable(line))
    if config.json:
        print(json.dumps(report.to_dict()))
    return 1 if report.unreadable else 0


def _answers(form: "Artefact", judged: "Judged", console: "Console") -> tuple["np.ndarray", list[int], dict[str, str]]:
    """(probabilities [N, K], the place of each among the judged, name of an image → why it has no answer)."""
    import numpy as np

    from common.progress import printable, track
    from export.evaluation.answering import answer_each
    from train.data.folder import UNREADABLE, describe_left_out

    for line in describe_left_out([stranger for stranger in judged.left_out if stranger.why != UNREADABLE]):
        console.print(printable(line))
    answers = answer_each(form, range(len(judged)), judged.pixels)
    answers = list(track(console, "answering")(answers, len(judged)))
    places = [index for index, answer in enumerate(answers) if not isinstance(answer, Refusal)]
    unreadable = {str(stranger.path): stranger.why for stranger in judged.left_out if stranger.why == UNREADABLE}
    unreadable |= {
        judged.name(index): str(answer) for index, answer in enumerate(answers) if isinstance(answer, Refusal)
    }
    if not places:
        raise Refusal(f"none of the {len(answers)} images could be answered: {next(iter(unreadable.values()), '')}")
    return np.stack([answers[index] for index in places]), places, unreadable


def _mistakes(
    judged: "Judged",
    probabilities: "np.ndarray",
    targets: "np.ndarray",
    places: list[int],
    labels: tuple[str, ...],
) -> tuple["Mistake", ...]:
    """All of them, the surest first; those that are shown have their pixels."""
    import numpy as np

    from export.evaluation.report import NUM_SHOWN, Mistake
    from export.runtimes.probabilities import best

    answers = best(probabilities, 1)[:, 0]
    wrong = np.flatnonzero(answers != targets)
    wrong = wrong[np.argsort(-probabilities[wrong, answers[wrong]], kind="stable")]
    return tuple(
        Mistake(
            image=judged.name(places[row]),
            truth=labels[targets[row]],
            answer=labels[answers[row]],
            probability=float(probabilities[row, answers[row]]),
            of_truth=float(probabilities[row, targets[row]]),
            pixels=judged.enlarged(places[row]) if rank < NUM_SHOWN else None,
        )
        for rank, row in enumerate(wrong)
    )


def _files(report: "Report") -> dict[str, bytes]:
    """Name → content; the page is the last to be written."""
    import json

    from export.evaluation import figures
    from export.evaluation.report import describe_error, to_html

    title = figures.figure_text(report.title, 80)
    error = f"expected calibration error {describe_error(report.evaluation)}"
    drawn = report.shown[:NUM_DRAWN]
    captions = [
        f"{figures.figure_text(mistake.answer)} {mistake.probability:.1%}\nis {figures.figure_text(mistake.truth)}"
        for mistake, _ in drawn
    ]
    num = len(report.mistakes)
    surest = f"{len(drawn)} of {num:,} wrong answers, the surest first" if num else "no answer is wrong"
    pictures = {
        "confusion.png": figures.confusion_figure(report.evaluation, f"{title}\n{report.score}"),
        "reliability.png": figures.reliability_figure(report.evaluation, f"{title}\n{error}"),
        "mistakes.png": figures.mistakes_figure([pixels for _, pixels in drawn], captions, surest),
    }
    files = {name: figures.draw(figure) for name, figure in pictures.items()}
    page = to_html(report, confusion_png=files["confusion.png"], reliability_png=files["reliability.png"])
    record = (json.dumps(report.to_dict(), indent=1) + "\n").encode()
    return {**files, "report.json": record, "report.html": page.encode()}


def _print_summary(console: "Console", report: "Report") -> None:
    """The figures, the weakest classes, the most frequent mistakes, and what could not be read."""
    from common.interval import percent
    from common.progress import printable
    from export.evaluation.report import describe_error, share

    evaluation, calibration = report.evaluation, report.evaluation.calibration
    console.print(f"{report.model} on {evaluation.top1.num:,} {report.what}")
    console.print(f"top-1 {share(evaluation.top1.value)}, 95 % interval {percent(evaluation.top1.interval)}")
    if top5 := evaluation.top5:
        console.print(f"top-5 {share(top5.value)}, 95 % interval {percent(top5.interval)}")
    console.print(
        f"expected calibration error {describe_error(evaluation)}; "
        f"on as many images chance alone makes up to {share(calibration.perfect_95)}"
    )
    _print_classes(console, evaluation)
    for truth, answer, count in evaluation.confusions(3):
        console.print(printable(f"{count} of {truth} taken for {answer}"))
    for name, why in list(report.unreadable.items())[:NUM_NAMED]:
        console.print(printable(f"not answered: {name}: {why}"))
    if report.unreadable:
        console.print(f"{len(report.unreadable):,} images could not be read and are in no figure")


def _print_classes(console: "Console", evaluation: "Evaluation") -> None:
    from rich.table import Table

    from common.interval import percent
    from common.progress import printable
    from export.evaluation.report import share, weakest_first

    table = Table("class", "images", "recall", "95 % interval", "precision", "95 % interval", "F1")
    for row in weakest_first(evaluation.classes)[:NUM_LISTED]:
        parts = [text for part in (row.recall, row.precision) for text in (share(part.value), percent(part.interval))]
        table.add_row(printable(row.label), str(row.images), *parts, share(row.f1))
    console.print(table)
    if len(evaluation.labels) > NUM_LISTED:
        console.print(f"these are the {NUM_LISTED} of {len(evaluation.labels)} classes that are recognised least often")


if __name__ == "__main__":
    sys.exit(run_command(command, EvaluateConfig, examples=EXAMPLES))
