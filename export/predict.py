"""python export/predict.py MODEL FILES_OR_FOLDER: what a model says of any number of images, without a server."""

import csv
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import read_whole, write_whole
from common.progress import make_console, printable, track
from common.refusal import Refusal
from export.model_file.reading import ReadingFlags, from_flags

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from export.artefacts import Artefact

EXAMPLES = (
    "python export/predict.py runs/photos/plain.onnx new-photos --out predictions.csv",
    "python export/predict.py models/fashion-mnist.onnx models/held-out/*.png --top-k 3 --out predictions.json",
    "python export/predict.py plain.onnx photos --cascade plain-int8.onnx",
    "python export/predict.py theirs.onnx photos --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --labels names.txt",
)
NUM_NAMED = 20  # unreadable images that are named on the screen; the file names all


@dataclass(frozen=True)
class PredictConfig(ReadingFlags):
    model: Annotated[Path, "checkpoint.pt, plain.safetensors, plain.onnx, plain.engine, or another ONNX classifier"]
    images: Annotated[tuple[Path, ...], "image files, and folders whose images are taken, those further down too"]
    out: Annotated[Path, "file to write: a .csv with a row per image, or the server's .json"] = Path("predictions.csv")
    top_k: Annotated[int, "classes per image"] = 1
    flips: Annotated[bool, "answer each image together with its mirror image: the mean of both logits"] = False
    cascade: Annotated[Path | None, "the other form of the model: int8 answers, and fp32 if that is in doubt"] = None

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise Refusal(f"--top-k must be 1 or more, got {self.top_k}")
        if self.out.suffix not in (".csv", ".json"):
            raise Refusal(f"--out must end with .csv or .json, got {self.out}")
        if not self.images:
            raise Refusal("name one image or folder or more: python export/predict.py plain.onnx photos")


def command(config: PredictConfig) -> int:
    """Answer images with any model and write a row for each; exit status 1 if one could not be read.

    Pixels and probabilities are those that the server computes.
    """
    from common.image import decode
    from export.artefacts import open_artefact
    from export.evaluation.answering import answer_each, mirrored
    from export.runtimes.cascade import Cascade
    from train.data.folder import describe_left_out, find_images

    console = make_console()
    form = open_artefact(config.model, hints=from_flags(config), cascade=config.cascade)
    if form.reading:
        console.print(f"{form.title}: {form.reading}")
    if config.flips:
        form = mirrored(form)
    paths, left_out = find_images(config.images)
    for line in describe_left_out(left_out):
        console.print(line)
    answers = answer_each(form, paths, lambda path: decode(read_whole(path), form.spec.image))
    results = [
        _result(path, answer, form.spec.labels, config.top_k)
        for path, answer in zip(paths, track(console, "answering")(answers, len(paths)), strict=True)
    ]
    if config.out.suffix == ".csv":
        content = _csv(results, min(config.top_k, len(form.spec.labels)))
    else:
        record = {"model": {"name": form.name, "digest": form.digest}, "results": results}
        content = json.dumps(record, indent=1) + "\n"
    # File names that are not UTF-8 stay themselves.
    write_whole(config.out, content.encode(errors="surrogateescape"))
    if isinstance(form.answer, Cascade):
        console.print(form.answer.counted)
    return _summarize(console, config, form, results)


def _result(path: Path, answer: "np.ndarray | Refusal", labels: tuple[str, ...], top_k: int) -> dict[str, Any]:
    """A result as the server gives it, or the reason why there is none."""
    from export.runtimes.runtime import best

    if isinstance(answer, Refusal):
        return {"image": str(path), "error": str(answer)}
    top = [
        {"label": labels[index], "index": index, "probability": float(answer[index])}
        for index in best(answer[None], top_k)[0].tolist()
    ]
    return {"image": str(path), **top[0], "top": top}


def _csv(results: list[dict[str, Any]], top_k: int) -> str:
    """A header and a row for each; the second guess is label_2 and so on, `error` is empty for most."""
    guess = ("label", "index", "probability")
    columns = [f"{name}_{rank}" if rank > 1 else name for rank in range(1, top_k + 1) for name in guess]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", *columns, "error"])
    for result in results:
        values = [row[name] for row in result.get("top", ()) for name in guess] or [""] * len(columns)
        writer.writerow([result["image"], *values, result.get("error", "")])
    return file.getvalue()


def _summarize(console: "Console", config: PredictConfig, form: "Artefact", results: list[dict[str, Any]]) -> int:
    """How many of each class; what could not be read, by name. The exit status."""
    counts = Counter(result["label"] for result in results if "label" in result).most_common(10)
    bad = [result for result in results if "error" in result]
    for result in bad[:NUM_NAMED]:
        console.print(printable(f"not answered: {result['image']}: {result['error']}"))
    if len(bad) > NUM_NAMED:
        console.print(f"and {len(bad) - NUM_NAMED} more, which {config.out} names")
    if counts:
        shown = ", ".join(f"{label} {count:,}" for label, count in counts)
        console.print(printable(f"{form.name}: {shown}"))
    console.print(f"wrote {config.out}: {len(results) - len(bad):,} of {len(results):,} images answered")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_command(command, PredictConfig, examples=EXAMPLES))
