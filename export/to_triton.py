"""python export/to_triton.py plain.onnx --out repository: write a model repository for Triton Inference Server."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import read_whole, sha256
from common.progress import make_console
from common.refusal import Refusal
from export.model_file.reading import ReadingFlags, from_flags

if TYPE_CHECKING:
    from export.triton_repository import Source

MAX_BATCH = 64  # of an ONNX file, which has no limit of its own; that of export/to_trt.py
EXAMPLES = (
    "python export/to_triton.py plain.onnx --out repository     # then: tritonserver --model-repository=repository",
    "python export/to_triton.py plain.engine --out repository --name digits --version 2",
    "python export/to_triton.py plain.onnx --out repository --kind cpu --max-batch 16 --max-queue-delay 500",
)


@dataclass(frozen=True)
class ToTritonConfig(ReadingFlags):
    model: Annotated[Path, "an .onnx file, or an .engine of tensorrt with its card"]
    out: Annotated[Path, "the repository: a folder of models, made or added to"] = Path("repository")
    name: Annotated[str | None, "what clients call the model (default: the file's name)"] = None
    version: Annotated[int, "version of the model, from 1 on"] = 1
    max_batch: Annotated[int | None, "largest batch to form (default: the engine's, 64 for ONNX)"] = None
    max_queue_delay: Annotated[int, "microseconds that a request may wait for a fuller batch"] = 0
    kind: Annotated[Literal["auto", "cpu", "gpu"], "where it runs; auto is on GPUs where there are any"] = "auto"
    json: Annotated[bool, "print the result as JSON on stdout"] = False


def command(config: ToTritonConfig) -> int:
    """Write a model repository for Triton: configuration, labels and the model, batched and warmed up."""
    from export.triton_repository import TYPES, config_text, publish

    console = make_console(json=config.json)
    name = config.name or config.model.stem
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise Refusal(f"--name may have letters, digits, '_', '-' and '.', and starts with no '.'; got {name!r}")
    if config.version < 1 or config.max_queue_delay < 0:
        found = f"got {config.version}, {config.max_queue_delay}"
        raise Refusal(f"--version counts from 1 and --max-queue-delay from 0; {found}")
    source = _read_engine(config) if config.model.suffix == ".engine" else _read_onnx(config)
    described, max_batch = source.described, _max_batch(config, source)
    if described.output_dtype not in TYPES:
        raise Refusal(f"{config.model} answers in {described.output_dtype}; Triton is given {', '.join(TYPES)}")
    labels = "".join(f"{label}\n" for label in described.spec.labels)
    if labels.count("\n") > len(described.spec.labels):
        raise Refusal(f"{config.model} has labels with line breaks, which Triton's list of labels cannot hold")
    fixed, (backend, _, file) = described.signature.batch, source.backend
    preferred = [] if fixed else sorted({min(source.best_batch, max_batch), max_batch})
    text = config_text(name, source, config.kind, max_batch, preferred, config.max_queue_delay)
    folder, shared = config.out / name, {"config.pbtxt": text.encode(), "labels.txt": labels.encode()}
    publish(folder, config.version, model=source.files, shared=shared)
    path = folder / str(config.version) / file
    console.print(f"wrote {path}: {backend}, {source.needs}")
    batches = f"batches up to {max_batch}, preferably {' or '.join(map(str, preferred))}"
    batches = f"{fixed} images in every request" if fixed else batches
    console.print(f"wrote {folder / 'config.pbtxt'} and labels.txt: {batches}")
    if config.json:
        record = {"name": name, "version": config.version, "backend": backend, "sha256": sha256(source.files[file])}
        print(json.dumps({"out": str(path), **record, "max_batch": max_batch, "preferred": preferred}))
    return 0


def _read_onnx(config: ToTritonConfig) -> "Source":
    from export.graphs.onnx_file import read_onnx
    from export.triton_repository import ONNX_RUNTIME, Source

    file = read_onnx(config.model, from_flags(config))
    files = {name: read_whole(config.model.parent / name) for name in file.graph.weight_files}
    files[ONNX_RUNTIME[2]] = read_whole(config.model)
    return Source(file, ONNX_RUNTIME, files, len(file.output_shape) - 2, 8, None, f"opset {file.opset}")


def _read_engine(config: ToTritonConfig) -> "Source":
    from export.model_file.engine_card import read_card
    from export.triton_repository import TENSORRT, Source

    path, content, card = config.model, read_whole(config.model), read_card(config.model)
    if sha256(content) != card.engine_sha256:
        raise Refusal(f"{path} does not fit its card: engine_sha256 differs; build it again with export/to_trt.py")
    if card.builder != "tensorrt":
        raise Refusal(f"{path} is an engine of {card.builder}, and Triton runs those of tensorrt alone; give the .onnx")
    if config.kind == "cpu":
        raise Refusal(f"{path} is an engine and runs on GPUs alone; leave out --kind cpu, or give the .onnx")
    smallest, best, largest = card.batch
    if card.signature.batch is None and smallest > 1:
        raise Refusal(f"{path} takes no batch under {smallest}, and Triton sends single images; build it from 1 on")
    needs = f"TensorRT {'.'.join(card.builder_version.split('.')[:3])} in the server"
    if card.version_compatible:
        needs += " or later, started with --backend-config=tensorrt,version-compatible=true"
    needs += f", compute capability {', '.join(card.compute_capabilities)}"
    return Source(card, TENSORRT, {TENSORRT[2]: content}, 0, best, largest, needs)


def _max_batch(config: ToTritonConfig, source: "Source") -> int:
    asked, largest, fixed = config.max_batch, source.max_batch, source.described.signature.batch
    if asked is not None and fixed:
        raise Refusal(f"{config.model} takes {fixed} images at a time, no more and no fewer; leave out --max-batch")
    if asked is not None and not 1 <= asked <= (largest or asked):
        raise Refusal(f"--max-batch must be from 1 to {largest or 'any number'}, got {asked}")
    return fixed or asked or largest or MAX_BATCH


if __name__ == "__main__":
    sys.exit(run_command(command, ToTritonConfig, examples=EXAMPLES))
