"""python export/evaluate.py MODEL: how good a model is on images that it was not trained on, as a report."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import write_whole
from common.progress import make_console, printable, track
from common.refusal import Refusal
from common.spec import DatasetName
from export.model_file.reading import ReadingFlags, from_flags

EXAMPLES = (
    "python export/evaluate.py runs/photos/plain.onnx --data-dir photos     # the test images of its run",
    "python export/evaluate.py models/fashion-mnist.onnx --out report",
    "python export/evaluate.py models/fashion-mnist.onnx --cascade models/fashion-mnist-int8.onnx",
    "python export/evaluate.py plain.onnx --store-reference      # so that the server tells drift",
    "python export/evaluate.py theirs.onnx --data-dir photos --labels names.txt --resize 256      # all images there",
)


@dataclass(frozen=True)
class EvaluateConfig(ReadingFlags):
    model: Annotated[Path, "checkpoint.pt, plain.safetensors, plain.onnx, plain.engine, or another ONNX classifier"]
    dataset: Annotated[DatasetName | None, "what to judge it on (default: the test images of its run)"] = None
    data_dir: Annotated[Path | None, "where the data set lies; a folder without a run's record is taken whole"] = None
    out: Annotated[Path, "folder for report.html, report.json and the figures"] = Path("report")
    flips: Annotated[bool, "answer each image together with its mirror image: the mean of both logits"] = False
    cascade: Annotated[Path | None, "the other form of the model: int8 answers, and fp32 if that is in doubt"] = None
    store_reference: Annotated[bool, "store counts of the answers in the model, for the server to compare with"] = False
    json: Annotated[bool, "print report.json on stdout"] = False

    def __post_init__(self) -> None:
        if self.flips and self.store_reference:
            raise Refusal("--store-reference is for the server, which mirrors no image: leave out --flips")
        if self.cascade and self.store_reference:
            raise Refusal("--store-reference is for one file, and --cascade judges two; leave one of them out")


def command(config: EvaluateConfig) -> int:
    """Judge a model on images whose classes are known; exit status 1 if one of them could not be read.

    A model of this project is judged on the test images that its run recorded, and on no other image of that folder.
    """
    from export.artefacts import open_artefact
    from export.evaluation.answering import find_judged, mirrored
    from export.evaluation.report import evaluate_form, print_summary, report_files
    from export.metadata import store_reference
    from export.runtimes.cascade import Cascade

    if config.store_reference and config.model.suffix not in (".onnx", ".engine"):
        raise Refusal(f"a reference is for what is served: name the .onnx or .engine made of {config.model}")
    console = make_console(json=config.json)
    form = open_artefact(config.model, hints=from_flags(config), cascade=config.cascade)
    if form.reading:
        console.print(f"{form.title}: {form.reading}")
    judged = find_judged(form, dataset=config.dataset, data_dir=config.data_dir, track=track(console, "reading images"))
    if config.flips:
        form, judged = mirrored(form), replace(judged, what=f"{judged.what}, each with its mirror image")
    report, probabilities = evaluate_form(form, judged, console)
    for name, content in report_files(report).items():
        write_whole(config.out / name, content)
    print_summary(console, report)
    if isinstance(form.answer, Cascade):
        console.print(form.answer.counted)
    console.print(f"wrote {config.out / 'report.html'}, report.json, confusion.png, reliability.png and mistakes.png")
    if config.store_reference:
        for line in store_reference(config.model, probabilities, what=judged.what):
            console.print(printable(line))
    if config.json:
        print(json.dumps(report.to_dict()))
    return 1 if report.unreadable else 0


if __name__ == "__main__":
    sys.exit(run_command(command, EvaluateConfig, examples=EXAMPLES))
