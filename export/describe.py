"""python export/describe.py model.onnx: write beside somebody else's classifier how it is read."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import write_whole
from common.progress import make_console
from export.model_file.reading import ReadingFlags, from_flags

EXAMPLES = (
    "python export/describe.py model.onnx --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --resize 256",
    "python export/describe.py model.onnx --labels names.txt --channels bgr --output scores",
    "python export/describe.py model.onnx              # writes nothing, and says how it is read now",
)


@dataclass(frozen=True)
class DescribeConfig(ReadingFlags):
    onnx: Annotated[Path, "somebody else's classifier"]
    json: Annotated[bool, "print how the net is read as JSON on stdout"] = False


def command(config: DescribeConfig) -> int:
    """Write model.onnx.json beside model.onnx: how pixels become its input, and what its answers mean.

    Every command that takes the file reads it. Fields of an earlier description that are not given now are kept.
    """
    from export.graphs.onnx_file import read_onnx
    from export.model_file.reading import NO_HINTS, description_path, read_description

    console = make_console(json=config.json)
    hints = from_flags(config)
    file = read_onnx(config.onnx, hints)  # refuses what does not fit
    if hints.sources:
        path = description_path(config.onnx)
        before = read_description(path) if path.exists() else NO_HINTS
        console.print(f"wrote {write_whole(path, hints.over(before).to_json().encode())}")
    reading = file.signature.reading
    console.print(f"{file.name}: {reading or 'a file of this project, which says itself how it is read'}")
    if config.json:
        names = {"labels": file.spec.labels, "output": file.signature.output_name}
        print(json.dumps({**names, **asdict(reading)} if reading else {}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, DescribeConfig, examples=EXAMPLES))
