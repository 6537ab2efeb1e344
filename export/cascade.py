"""python export/cascade.py plain.onnx plain-int8.onnx: from which gap on eight bits have float32's class."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import write_whole
from common.progress import make_console, progress
from common.refusal import Refusal

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
    from export.eight_bits.escalation import answer_both, images_to_choose_by, measure
    from export.metadata import rewrite_metadata
    from export.runtimes.cascade import RECORD, in_order
    from export.runtimes.onnx_session import OnnxSession
    from train.data import datasets

    console = make_console(json=config.json)
    quick, exact = in_order((config.first, config.second))
    reference, candidate = (OnnxSession(path, providers=("CPUExecutionProvider",)) for path in (exact, quick))
    provenance, image = candidate.model.provenance, candidate.model.spec.image
    training = provenance.get("training", {})
    if not isinstance(training.get("dataset"), str):
        raise Refusal(f"{quick} does not record what it was trained on; export it again with --dataset")
    dataset = datasets.load_as_trained(training, data_dir=config.data_dir, beside=quick.parent, image=image)
    calibration = provenance["export"].get("calibration")
    num = calibration.get("images") if isinstance(calibration, dict) else None
    if not isinstance(num, int) or not 0 < num <= len(dataset.train):
        raise Refusal(f"{quick} does not record how many images set its ranges; export it again")
    if not (set_aside := images_to_choose_by(dataset, num)):
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


if __name__ == "__main__":
    sys.exit(run_command(command, CascadeConfig, examples=EXAMPLES))
