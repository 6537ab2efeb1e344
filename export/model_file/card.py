"""The sidecar of an engine: plain.engine.json says what plain.engine is, and for which machine."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from common.documents import read_object
from common.files import read_whole
from common.refusal import Refusal
from common.spec import Spec
from export.model_file.signature import Signature, signature_of

FORMAT = "diracnet-engine-2"  # 1 did not name the GPU
Builder = Literal["tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True)
class EngineCard:
    name: str
    builder: Builder
    builder_version: str
    precision: str  # fp32, fp16 or int8; from the ONNX graph, which decides it
    batch: tuple[int, int, int]  # smallest, best and largest batch of the optimisation profile
    compute_capabilities: tuple[str, ...]  # of the GPUs that can run the engine: "8.9"
    gpu: str | None  # the model that tensorrt built for: "NVIDIA A10"; None where every one of these GPUs will do
    workspace_mib: int | None  # what the builder's scratch memory was limited to
    version_compatible: bool  # later versions of the library run it too
    refittable: bool  # its weights can be exchanged
    onnx_sha256: str
    engine_sha256: str
    signature: Signature
    output_dtype: str  # of the logits
    spec: Spec
    provenance: dict[str, Any]
    parity: dict[str, Any] | None  # the report of export/parity.py on the ONNX file, where there was one

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self), "spec": self.spec.to_dict()}, indent=1)


def card_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def layers_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".layers.json")


def read_card(engine: Path) -> EngineCard:
    """The card beside an engine; refuses a missing, damaged or foreign one, naming the field."""
    path = card_path(engine)
    if engine.is_file() and not path.exists():
        raise Refusal(
            f"{engine} has no card: {path.name} is not beside it; copy it there, "
            "or build the engine again with export/to_trt.py"
        )
    record = read_object(read_whole(path), str(path), todo="build the engine again with export/to_trt.py")
    if record.get("format") != FORMAT:
        raise Refusal(f"{path}: format is not {FORMAT}; build the engine again with export/to_trt.py")
    missing = [field.name for field in fields(EngineCard) if field.name not in record]
    if missing:
        raise Refusal(f"{path} lacks {', '.join(missing)}; build the engine again with export/to_trt.py")
    return EngineCard(
        name=_check(path, record, "name", str),
        builder=_check(path, record, "builder", str, get_args(Builder)),
        builder_version=_check(path, record, "builder_version", str),
        precision=_check(path, record, "precision", str),
        batch=_batch(path, record),
        compute_capabilities=tuple(map(str, _check(path, record, "compute_capabilities", list))),
        gpu=_check(path, record, "gpu", (str, NoneType)),
        workspace_mib=_check(path, record, "workspace_mib", (int, NoneType)),
        version_compatible=_check(path, record, "version_compatible", bool),
        refittable=_check(path, record, "refittable", bool),
        onnx_sha256=_check(path, record, "onnx_sha256", str),
        engine_sha256=_check(path, record, "engine_sha256", str),
        signature=_signature(path, record),
        output_dtype=_check(path, record, "output_dtype", str),
        spec=Spec.from_dict(record["spec"]),
        provenance=_check(path, record, "provenance", dict),
        parity=_check(path, record, "parity", (dict, NoneType)),
    )


def _check(
    path: Path, record: dict[str, Any], name: str, kind: type | tuple[type, ...], allowed: tuple[str, ...] = ()
) -> Any:
    value = record[name]
    if not isinstance(value, kind) or (allowed and value not in allowed):
        raise Refusal(f"{path}: {name} cannot be {value!r}; build the engine again with export/to_trt.py")
    return value


def _batch(path: Path, record: dict[str, Any]) -> tuple[int, int, int]:
    batch = _check(path, record, "batch", list)
    if len(batch) != 3 or not all(isinstance(size, int) for size in batch) or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise Refusal(f"{path}: batch cannot be {batch!r}; build the engine again with export/to_trt.py")
    return batch[0], batch[1], batch[2]


def _signature(path: Path, record: dict[str, Any]) -> Signature:
    try:
        names = _check(path, record, "signature", dict)
        return signature_of(names)
    except (TypeError, KeyError) as error:
        raise Refusal(f"{path}: signature is damaged ({error}); build the engine again") from error
