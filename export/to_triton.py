"""python export/to_triton.py plain.onnx --out repository: write a model repository for Triton Inference Server."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal
from export.model_file.reading import ReadingFlags, from_flags

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
    import json

    from common.files import sha256
    from common.progress import make_console
    from export.triton_repository import config_text, publish

    console = make_console(json=config.json)
    name = config.name or config.model.stem
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise Refusal(f"--name may have letters, digits, '_', '-' and '.', and starts with no '.'; got {name!r}")
    if config.version < 1 or config.max_queue_delay < 0:
        raise Refusal(
            f"--version counts from 1 and --max-queue-delay from 0; got {config.version}, {config.max_queue_delay}"
        )
    source = _read_engine(config) if config.model.suffix == ".engine" else _read_onnx(config)
    model = _triton_model(config, source, name)
    labels = "".join(f"{label}\n" for label in source.labels)
    if labels.count("\n") > len(source.labels):
        raise Refusal(f"{config.model} has labels with line breaks, which Triton's list of labels cannot hold")
    shared = {"config.pbtxt": config_text(model).encode(), "labels.txt": labels.encode()}
    folder = config.out / name
    publish(folder, config.version, model=source.files, shared=shared)
    path = folder / str(config.version) / model.backend[2]
    console.print(f"wrote {path}: {model.backend[0]}, {source.needs}")
    preferred = " or ".join(map(str, model.preferred))
    batches = f"batches up to {model.max_batch}, preferably {preferred}"
    if model.signature.batch:
        batches = f"{model.max_batch} images in every request"
    console.print(f"wrote {folder / 'config.pbtxt'} and labels.txt: {batches}")
    if config.json:
        digest = sha256(source.files[model.backend[2]])
        record = {"name": name, "version": config.version, "backend": model.backend[0], "sha256": digest}
        print(json.dumps({"out": str(path), **record, "max_batch": model.max_batch, "preferred": model.preferred}))
    return 0


@dataclass(frozen=True)
class Source:
    """What Triton needs to know of an ONNX file or an engine."""

    backend: tuple[str, str, str]
    files: dict[str, bytes]
    signature: Any
    output_dtype: str
    num_ones: int
    labels: tuple[str, ...]
    temperature: float
    best_batch: int
    max_batch: int | None  # None where any will do
    needs: str  # of the server, for people


def _read_onnx(config: ToTritonConfig) -> Source:
    from common.files import read_whole
    from export.graphs.onnx_file import read_onnx
    from export.triton_repository import ONNX_RUNTIME

    file = read_onnx(config.model, from_flags(config))
    files = {name: read_whole(config.model.parent / name) for name in file.weight_files}
    return Source(
        backend=ONNX_RUNTIME,
        files={ONNX_RUNTIME[2]: read_whole(config.model), **files},
        signature=file.signature,
        output_dtype=file.output_dtype,
        num_ones=len(file.output_shape) - 2,
        labels=file.spec.labels,
        temperature=file.spec.temperature,
        best_batch=8,
        max_batch=None,
        needs=f"opset {file.opset}",
    )


def _read_engine(config: ToTritonConfig) -> Source:
    from common.files import read_whole, sha256
    from export.model_file.engine_card import read_card
    from export.triton_repository import TENSORRT

    path, content, card = config.model, read_whole(config.model), read_card(config.model)
    if sha256(content) != card.engine_sha256:
        raise Refusal(f"{path} does not fit its card: engine_sha256 differs; build it again with export/to_trt.py")
    if card.builder != "tensorrt":
        raise Refusal(f"{path} is an engine of {card.builder}, and Triton runs those of tensorrt alone; give the .onnx")
    if config.kind == "cpu":
        raise Refusal(f"{path} is an engine and runs on GPUs alone; leave out --kind cpu, or give the .onnx")
    if card.signature.batch is None and card.batch[0] > 1:
        raise Refusal(
            f"{path} takes no batch under {card.batch[0]}, and Triton sends single images; build it from 1 on"
        )
    version = ".".join(card.builder_version.split(".")[:3])
    needs = f"TensorRT {version} in the server" + (
        " or later, started with --backend-config=tensorrt,version-compatible=true" if card.version_compatible else ""
    )
    return Source(
        backend=TENSORRT,
        files={TENSORRT[2]: content},
        signature=card.signature,
        output_dtype=card.output_dtype,
        num_ones=0,
        labels=card.spec.labels,
        temperature=card.spec.temperature,
        best_batch=card.batch[1],
        max_batch=card.batch[2],
        needs=f"{needs}, compute capability {', '.join(card.compute_capabilities)}",
    )


def _triton_model(config: ToTritonConfig, source: Source, name: str) -> Any:
    from export.triton_repository import TYPES, TritonModel

    asked, fixed, largest = config.max_batch, source.signature.batch, source.max_batch
    if asked is not None and fixed:
        raise Refusal(f"{config.model} takes {fixed} images at a time, no more and no fewer; leave out --max-batch")
    if asked is not None and not 1 <= asked <= (largest or asked):
        raise Refusal(f"--max-batch must be from 1 to {largest or 'any number'}, got {asked}")
    if source.output_dtype not in TYPES:
        raise Refusal(f"{config.model} answers in {source.output_dtype}; Triton is given {', '.join(TYPES)}")
    max_batch = fixed or asked or largest or MAX_BATCH
    return TritonModel(
        name=name,
        backend=source.backend,
        signature=source.signature,
        output_dtype=source.output_dtype,
        num_classes=len(source.labels),
        num_ones=source.num_ones,
        max_batch=max_batch,
        preferred=() if fixed else tuple(sorted({min(source.best_batch, max_batch), max_batch})),
        kind=config.kind,
        max_queue_delay_us=config.max_queue_delay,
        temperature=source.temperature,
    )


if __name__ == "__main__":
    sys.exit(run_command(command, ToTritonConfig, examples=EXAMPLES))
