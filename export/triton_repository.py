"""A model repository of Triton Inference Server: config.pbtxt, and folders that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import read_whole, write_whole
from common.refusal import Refusal

if TYPE_CHECKING:
    from export.graphs.onnx_file import OnnxFile
    from export.model_file.engine_card import EngineCard

Files = Mapping[str, bytes]  # path within a folder → content
KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
TYPES = {"uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "bfloat16": "TYPE_BF16"}
# Backend, platform and file name of the two supported kinds of model.
ONNX_RUNTIME = ("onnxruntime", "onnxruntime_onnx", "model.onnx")
TENSORRT = ("tensorrt", "tensorrt_plan", "model.plan")


class Word(str):
    """The value of an enumeration, which is written without quotes."""


@dataclass(frozen=True)
class Source:
    """The file that Triton is to serve. Its batch is free up to a limit, or the fixed one of its signature."""

    described: "OnnxFile | EngineCard"
    backend: tuple[str, str, str]
    files: dict[str, bytes]  # name in the repository → content
    num_ones: int  # of the output [N, K, 1, ...] behind its classes
    best_batch: int
    max_batch: int | None  # None if any will do
    needs: str  # of the server, for people


def config_text(name: str, source: Source, kind: str, max_batch: int, preferred: list[int], delay_us: int) -> str:
    """config.pbtxt in protobuf's text format; the dynamic batcher aims at the batches `preferred`."""
    names, spec, fixed = source.described.signature, source.described.spec, source.described.signature.batch
    backend, platform, file = source.backend
    images = {"data_type": Word(TYPES[names.dtype]), "dims": list(names.shape if fixed else names.shape[1:])}
    logits = {
        "name": names.output_name,
        "data_type": Word(TYPES[source.described.output_dtype]),
        "dims": [*([fixed] if fixed else []), len(spec.labels), *[1] * source.num_ones],
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
        fields["dynamic_batching"] = {
            "preferred_batch_size": preferred,
            "max_queue_delay_microseconds": delay_us,
        }
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
        differing = sorted(name for name in {*held, *model} if held.get(name) != model.get(name))
        raise Refusal(
            f"{target} holds another model: {', '.join(differing)} differs; give a new --version, or remove that folder"
        )


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
