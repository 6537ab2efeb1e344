"""python export/cascade.py plain.onnx plain-int8.onnx: from which gap on eight bits have float32's class."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from export.runtimes.runtime import Runtime
    from train.data.datasets import Dataset

EXAMPLES = (
    "python export/cascade.py plain.onnx plain-int8.onnx",
    "python export/cascade.py plain.onnx plain-int8.onnx --data-dir photos     # a net of photographs, which lie there",
    "python export/cascade.py models/fashion-mnist.onnx models/fashion-mnist-int8.onnx",
)


@dataclass(frozen=True)
class CascadeConfig:
    first: Annotated[Path, "the fp32 or the int8 form of a net"]
    second: Annotated[Path, "the other one"]
    data_dir: Annotated[Path | None, "where the data set that the net learnt lies"] = None
    json: Annotated[bool, "print what is recorded as JSON on stdout"] = False


def command(config: CascadeConfig) -> int:
    """Measure what --cascade needs to know, and write it into the int8 file, whose graph stays as it is.

    export/to_onnx.py --precision int8 does the same: this is for files that were written before it did.
    """
    import json

    from common.files import write_whole
    from common.progress import make_console, progress
    from export.eight_bits.escalation import answer_both, images_to_choose_by, measure
    from export.metadata import rewrite_metadata
    from export.runtimes.cascade import RECORD, in_order
    from export.runtimes.onnx_session import OnnxSession

    console = make_console(json=config.json)
    quick, exact = in_order((config.first, config.second))
    reference, candidate = (OnnxSession(path, providers=("CPUExecutionProvider",)) for path in (exact, quick))
    dataset = _dataset(quick, candidate, config.data_dir)
    provenance = candidate.model.provenance
    set_aside = images_to_choose_by(dataset, _num_calibration(quick, provenance["export"], dataset))
    if not set_aside:
        raise Refusal(f"{quick}: no image is left to choose a threshold by; train on more than these")
    with progress(console, "measuring", sum(map(len, (dataset.test, *set_aside)))) as advance:
        chosen_by, test = (answer_both(reference, candidate, parts, advance) for parts in (set_aside, [dataset.test]))
    evidence = measure(chosen_by, test)
    record = {**provenance["export"], RECORD: evidence.to_dict()}
    write_whole(quick, rewrite_metadata(quick, {**provenance, "export": record}))
    console.print(f"wrote {quick}: {evidence}")
    if config.json:
        print(json.dumps(evidence.to_dict()))
    return 0


def _dataset(quick: Path, session: "Runtime", data_dir: Path | None) -> "Dataset":
    """What the net learnt, divided as its run divided it."""
    from train.data import datasets

    training = session.model.provenance.get("training", {})
    if not isinstance(training.get("dataset"), str):
        raise Refusal(f"{quick} does not record what it was trained on; export it again with --dataset")
    return datasets.load_as_trained(training, data_dir=data_dir, beside=quick.parent, image=session.model.spec.image)


def _num_calibration(quick: Path, record: dict[str, Any], dataset: "Dataset") -> int:
    """How many training images set the ranges, by the export's record."""
    calibration = record.get("calibration")
    num = calibration.get("images") if isinstance(calibration, dict) else None
    if not isinstance(num, int) or not 0 < num <= len(dataset.train):
        raise Refusal(f"{quick} does not record how many images set its ranges; export it again")
    return num


if __name__ == "__main__":
    sys.exit(run_command(command, CascadeConfig, examples=EXAMPLES))
