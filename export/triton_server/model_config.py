"""The config.pbtxt of a model for Triton Inference Server."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from export.model_file.signature import Signature

KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
TYPES = {"uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "bfloat16": "TYPE_BF16"}
# Backend, platform and file name of the two supported kinds of model.
ONNX_RUNTIME = ("onnxruntime", "onnxruntime_onnx", "model.onnx")
TENSORRT = ("tensorrt", "tensorrt_plan", "model.plan")


class Word(str):
    """The value of an enumeration, which is written without quotes."""


@dataclass(frozen=True)
class TritonModel:
    """One model for Triton. Its batch is free up to `max_batch`, or the fixed one of the signature."""

    name: str
    backend: tuple[str, str, str]
    signature: Signature
    output_dtype: str
    num_classes: int
    num_ones: int  # of the output [N, K, 1, ...] behind its classes
    max_batch: int
    preferred: tuple[int, ...]  # batches that the dynamic batcher aims at
    kind: str
    max_queue_delay_us: int
    temperature: float = 1.0  # probabilities are the softmax of the output divided by it


def config_text(model: TritonModel) -> str:
    """config.pbtxt in protobuf's text format."""
    backend, platform, file = model.backend
    fixed = model.signature.batch
    fields: dict[str, Any] = {
        "name": model.name,
        "backend": backend,
        "platform": platform,
        "default_model_filename": file,
        "max_batch_size": 0 if fixed else model.max_batch,  # 0: dims hold the batch, and Triton forms none
        "input": [{"name": model.signature.input_name, **_images(model)}],
        "output": [
            {
                "name": model.signature.output_name,
                "data_type": Word(TYPES[model.output_dtype]),
                "dims": [*([fixed] if fixed else []), model.num_classes, *[1] * model.num_ones],
                "label_filename": "labels.txt",
            }
        ],
        "instance_group": [{"kind": Word(KINDS[model.kind]), "count": 1}],
        "model_warmup": [_warmup(model, batch) for batch in ([1] if fixed else sorted({1, model.max_batch}))],
    }
    if model.temperature != 1:  # Triton gives logits; clients that want probabilities read it here
        fields["parameters"] = [{"key": "temperature", "value": {"string_value": repr(model.temperature)}}]
    if not fixed:
        fields["dynamic_batching"] = {
            "preferred_batch_size": list(model.preferred),
            "max_queue_delay_microseconds": model.max_queue_delay_us,
        }
    return "\n".join(_lines(fields)) + "\n"


def _images(model: TritonModel) -> dict[str, Any]:
    shape = model.signature.shape if model.signature.batch else model.signature.shape[1:]
    return {"data_type": Word(TYPES[model.signature.dtype]), "dims": list(shape)}


def _warmup(model: TritonModel, batch: int) -> dict[str, Any]:
    """Black images before the first request: `batch` times what dims say."""
    value = {**_images(model), "zero_data": True}
    name = f"batch {model.signature.batch or batch}"
    return {"name": name, "batch_size": batch, "inputs": [{"key": model.signature.input_name, "value": value}]}


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
