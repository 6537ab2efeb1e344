"""python export/to_triton.py plain.onnx --out repository: write a model repository for Triton Inference Server."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import read_whole, sha256, write_whole
from common.progress import make_console
from common.refusal import Refusal
from export.model_file.reading import ReadingFlags, from_flags

if TYPE_CHECKING:
    from export.graphs.onnx_file import OnnxFile
    from export.model_file.engine_card import EngineCard

Files = Mapping[str, bytes]  # path within a folder → content
KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
TYPES = {"uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "bfloat16": "TYPE_BF16"}
# Backend, platform and file name of the two supported kinds of model.
ONNX_RUNTIME = ("onnxruntime", "onnxruntime_onnx", "model.onnx")
TENSORRT = ("tensorrt", "tensorrt_plan", "model.plan")
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


class Word(str):
    """The value of an enumeration, which is written without quotes."""


@dataclass(frozen=True)
class TritonModel:
    """The file that Triton is to serve. Its batch is free up to a limit, or the fixed one of its signature."""

    described: "OnnxFile | EngineCard"
    backend: tuple[str, str, str]
    files: dict[str, bytes]  # name in the repository → content
    num_ones: int  # of the output [N, K, 1, ...] behind its classes
    best_batch: int
    max_batch: int | None  # None if any will do
    needs: str  # of the server, for people


def command(config: ToTritonConfig) -> int:
    """Write a model repository for Triton: configuration, labels and the model, batched and warmed up."""
    console = make_console(json=config.json)
    name = config.name or config.model.stem
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise Refusal(f"--name may have letters, digits, '_', '-' and '.', and starts with no '.'; got {name!r}")
    if config.version < 1 or config.max_queue_delay < 0:
        found = f"got {config.version}, {config.max_queue_delay}"
        raise Refusal(f"--version counts from 1 and --max-queue-delay from 0; {found}")
    model = _read_engine(config) if config.model.suffix == ".engine" else _read_onnx(config)
    described, max_batch = model.described, _max_batch(config, model)
    if described.output_dtype not in TYPES:
        raise Refusal(f"{config.model} answers in {described.output_dtype}; Triton is given {', '.join(TYPES)}")
    labels = "".join(f"{label}\n" for label in described.spec.labels)
    if labels.count("\n") > len(described.spec.labels):
        raise Refusal(f"{config.model} has labels with line breaks, which Triton's list of labels cannot hold")
    fixed, (backend, _, file) = described.signature.batch, model.backend
    preferred = [] if fixed else sorted({min(model.best_batch, max_batch), max_batch})
    text = config_text(name, model, config.kind, max_batch, preferred, config.max_queue_delay)
    folder, shared = config.out / name, {"config.pbtxt": text.encode(), "labels.txt": labels.encode()}
    publish(folder, config.version, model=model.files, shared=shared)
    path = folder / str(config.version) / file
    console.print(f"wrote {path}: {backend}, {model.needs}")
    batches = f"batches up to {max_batch}, preferably {' or '.join(map(str, preferred))}"
    batches = f"{fixed} images in every request" if fixed else batches
    console.print(f"wrote {folder / 'config.pbtxt'} and labels.txt: {batches}")
    if config.json:
        record = {"name": name, "version": config.version, "backend": backend, "sha256": sha256(model.files[file])}
        print(json.dumps({"out": str(path), **record, "max_batch": max_batch, "preferred": preferred}))
    return 0


def _read_onnx(config: ToTritonConfig) -> TritonModel:
    from export.graphs.onnx_file import read_onnx

    file = read_onnx(config.model, from_flags(config))
    files = {name: read_whole(config.model.parent / name) for name in file.graph.weight_files}
    files[ONNX_RUNTIME[2]] = read_whole(config.model)
    return TritonModel(file, ONNX_RUNTIME, files, len(file.output_shape) - 2, 8, None, f"opset {file.opset}")


def _read_engine(config: ToTritonConfig) -> TritonModel:
    from export.model_file.engine_card import read_card

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
    return TritonModel(card, TENSORRT, {TENSORRT[2]: content}, 0, best, largest, needs)


def _max_batch(config: ToTritonConfig, model: TritonModel) -> int:
    asked, largest, fixed = config.max_batch, model.max_batch, model.described.signature.batch
    if asked is not None and fixed:
        raise Refusal(f"{config.model} takes {fixed} images at a time, no more and no fewer; leave out --max-batch")
    if asked is not None and not 1 <= asked <= (largest or asked):
        raise Refusal(f"--max-batch must be from 1 to {largest or 'any number'}, got {asked}")
    return fixed or asked or largest or MAX_BATCH


def config_text(name: str, model: TritonModel, kind: str, max_batch: int, preferred: list[int], delay_us: int) -> str:
    """config.pbtxt in protobuf's text format; the dynamic batcher aims at the batches `preferred`."""
    names, spec, fixed = model.described.signature, model.described.spec, model.described.signature.batch
    backend, platform, file = model.backend
    images = {"data_type": Word(TYPES[names.dtype]), "dims": list(names.shape if fixed else names.shape[1:])}
    logits = {
        "name": names.output_name,
        "data_type": Word(TYPES[model.described.output_dtype]),
        "dims": [*([fixed] if fixed else []), len(spec.labels), *[1] * model.num_ones],
        "label_filename": "labels.txt",
    }
    black = [{"key": names.input_name, "value": {**images, "zero_data": True}}]  # before the first request
    fields: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "platform": platform,
        "default_model_filename": file,
        "max_batch_size": 0 if fixed else max_batch,  # 0: dims hold the batch, and Triton forms none
        "input": [{"name": names.input_name, **images}],
        "output": [logits],
        "instance_group": [{"kind": Word(KINDS[kind]), "count": 1}],
        "model_warmup": [
            {"name": f"batch {fixed or batch}", "batch_size": batch, "inputs": black}
            for batch in ([1] if fixed else sorted({1, max_batch}))
        ],
    }
    if spec.temperature != 1:  # Triton returns logits; clients divide them by it before the softmax
        fields["parameters"] = [{"key": "temperature", "value": {"string_value": repr(spec.temperature)}}]
    if not fixed:
        fields["dynamic_batching"] = {"preferred_batch_size": preferred, "max_queue_delay_microseconds": delay_us}
    return "\n".join(_lines(fields)) + "\n"


def publish(folder: Path, version: int, *, model: Files, shared: Files) -> None:
    """Put the files `model` into the folder of a version, and the files `shared` by all versions beside it.

    Refuses a version that holds another model, and shared files other than those that earlier versions use.
    """
    target = folder / str(version)
    if target.exists():
        _refuse_another_model(target, model)
    if any(path.name.isdigit() and path != target for path in folder.glob("*")):
        _refuse_other_shared_files(folder, shared)
    if not folder.exists():
        _write_folder(folder, {**shared, **{f"{version}/{name}": content for name, content in model.items()}})
        return
    for name, content in shared.items():
        write_whole(folder / name, content)
    if not target.exists():
        _write_folder(target, model)


def _lines(fields: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in fields.items():
        items = value if isinstance(value, list) else [value]
        if not isinstance(items[0], dict):
            # Protobuf takes JSON's escapes, but no surrogates.
            yield f"{indent}{name}: {value if isinstance(value, Word) else json.dumps(value, ensure_ascii=False)}"
            continue
        for item in items:
            yield f"{indent}{name} {{"
            yield from _lines(item, indent + "  ")
            yield f"{indent}}}"


def _refuse_another_model(target: Path, model: Files) -> None:
    """The same model has the same files with the same bytes."""
    held = {path.relative_to(target).as_posix(): read_whole(path) for path in target.rglob("*") if path.is_file()}
    if held != model:
        names = ", ".join(sorted(name for name in {*held, *model} if held.get(name) != model.get(name)))
        raise Refusal(f"{target} holds another model: {names} differs; give a new --version, or remove that folder")


def _refuse_other_shared_files(folder: Path, shared: Files) -> None:
    for name, content in shared.items():
        path = folder / name
        held = read_whole(path) if path.exists() else b""
        if held != content:
            lines = zip(held.decode(errors="replace").splitlines(), content.decode().splitlines(), strict=False)
            changes = (f"{old.strip()!r}, not {new.strip()!r}" for old, new in lines if old != new)
            first = next(changes, "shorter or longer")
            raise Refusal(f"{path} serves other versions too and says {first}; choose another --name for this model")


def _write_folder(target: Path, files: Files) -> None:
    """Write into a folder beside `target`, then rename it: a server that watches it never sees an incomplete one."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        for name, content in files.items():
            write_whole(part / name, content)
        os.rename(part, target)
    except OSError as error:
        raise Refusal(f"cannot write {target}: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # renamed, or of no use


if __name__ == "__main__":
    sys.exit(run_command(command, ToTritonConfig, examples=EXAMPLES))
