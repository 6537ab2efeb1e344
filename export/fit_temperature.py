"""python export/fit_temperature.py plain.onnx: give a file whose run had no temperature one; the graph stays."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.documents import read_json
from common.files import read_whole, sha256, write_whole
from common.progress import make_console, progress
from common.refusal import Refusal

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from export.artefacts import Artefact
    from train.data.datasets import Part

EXAMPLES = (
    "python export/fit_temperature.py runs/old/plain.onnx runs/old/plain-int8.onnx",
    "python export/fit_temperature.py runs/photos/plain.onnx --data-dir photos",
    "python export/fit_temperature.py old.onnx --validation 0.02       # a file that does not say what was held out",
)


@dataclass(frozen=True)
class FitTemperatureConfig:
    onnx: Annotated[tuple[Path, ...], "an .onnx file of this project; more forms of the same net get what it gets"]
    data_dir: Annotated[Path | None, "where the data set lies"] = None
    validation: Annotated[float | None, "the share that training held out, for a file that does not record it"] = None
    json: Annotated[bool, "print the fit as JSON on stdout"] = False

    def __post_init__(self) -> None:
        if not self.onnx or any(path.suffix != ".onnx" for path in self.onnx):
            raise Refusal("name .onnx files; a run gets its temperature by train/run.py --resume, an engine when built")
        if self.validation is not None and not 0 < self.validation < 1:
            raise Refusal(f"--validation must be above 0 and below 1, got {self.validation}")


def command(config: FitTemperatureConfig) -> int:
    """Fit one temperature on the images that a net's run held out, and write it into its .onnx files.

    Only the metadata changes; the record says of which file it is. Test images are not read.
    """
    import numpy as np

    from export.artefacts import open_artefact
    from export.metadata import rewrite_metadata
    from export.model_file.reference import KEY
    from train.temperature import fit_temperature

    console = make_console(json=config.json)
    forms = [open_artefact(path) for path in config.onnx]
    for form in forms:
        _refuse(form, forms[0])
    held = _held_out(forms[0], config)
    fit = fit_temperature(_logits(forms[0], held, console), np.asarray(held.targets))
    console.print(str(fit))
    if fit.why_not:
        raise Refusal(f"nothing was written: {fit.why_not}")
    record = fit.to_dict() | ({"validation": config.validation} if config.validation else {})
    contents: dict[Path, bytes] = {}
    for form in forms:
        training = form.provenance["training"] | {"calibration": record | {"sha256_before": form.digest}}
        provenance = form.provenance | {"training": training}
        content = rewrite_metadata(form.path, provenance, temperature=record["temperature"])
        contents |= {form.path: content, **_report(form, content, training)}
    for path, content in contents.items():
        console.print(f"wrote {write_whole(path, content)}")
    for form in forms:
        if KEY in form.provenance:
            console.print(f"the reference in {form.path} was of other probabilities: store it again")
    if config.json:
        print(json.dumps(fit.to_dict()))
    return 0


def _refuse(form: "Artefact", first: "Artefact") -> None:
    """Refuses a file of another program, one that has a temperature, and one of another net than `first`."""
    if form.reading or not form.provenance:
        raise Refusal(f"{form.path} is not a file of this project: use export/describe.py --temperature")
    if form.spec.temperature != 1:
        raise Refusal(f"{form.path} has a temperature of {form.spec.temperature:g} already: nothing to do")
    net, other = (file.provenance.get("export", {}).get("plain_sha256") for file in (form, first))
    if form is not first and (net is None or net != other):
        raise Refusal(f"{form.path} and {first.path} were not exported from one plain net; fit them one by one")


def _held_out(form: "Artefact", config: FitTemperatureConfig) -> "Part":
    from train.data import datasets

    training = form.provenance.get("training", {})
    if "dataset" not in training:
        raise Refusal(f"{form.path} does not say what it was trained on, and so not what was held out")
    if "validation" not in training and config.validation is None:
        trained = training.get("command", "a command that is not recorded")
        raise Refusal(f"{form.path} does not record which images were held out: give --validation as {trained} did")
    recorded = {"validation": config.validation, **training}
    if config.validation not in (None, recorded["validation"]):
        raise Refusal(f"{form.path} records that {training['validation']:g} was held out; leave --validation out")
    image = form.spec.image
    dataset = datasets.load_as_trained(recorded, data_dir=config.data_dir, beside=form.path.parent, image=image)
    assert dataset.validation is not None  # `divide` made it
    return dataset.validation


def _logits(form: "Artefact", held: "Part", console: "Console") -> "np.ndarray":
    """float32 [N, K]; refuses images that cannot be read."""
    import numpy as np

    from export.compare import answer_part

    if not len(held):
        return np.zeros((0, len(form.spec.labels)), np.float32)
    with progress(console, "answering", len(held)) as advance:
        (logits,) = answer_part((form.answer,), held, advance)
    if missing := len(held) - len(logits):
        raise Refusal(f"{missing} of the held-out images cannot be read; mend them")
    return logits


def _report(form: "Artefact", content: bytes, training: dict[str, Any]) -> dict[Path, bytes]:
    """The report of export/parity.py beside a file, if it is about it, with the new file named as well.

    It compared the graph, which stays.
    """
    path = form.path.with_suffix(".json")
    try:
        report: dict[str, Any] = read_json(read_whole(path)) if path.exists() else {}
        (name,) = (name for name, digest in report["artefacts"].items() if digest == form.digest)
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}  # none, another program's file of that name, or of another model
    report["artefacts"] |= {name: sha256(content), f"{name} before it had a temperature": form.digest}
    return {path: (json.dumps(report | {"training": training}, indent=1) + "\n").encode()}


if __name__ == "__main__":
    sys.exit(run_command(command, FitTemperatureConfig, examples=EXAMPLES))
