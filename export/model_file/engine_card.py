"""The card of an engine: plain.engine.json describes plain.engine and the machine it is for."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from common.documents import read_object, wrong_fields
from common.files import read_whole
from common.refusal import Refusal
from common.spec import Spec
from export.model_file.signature import Signature

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
    gpu: str | None  # the model that tensorrt built for: "NVIDIA A10"; None if any of these GPUs will do
    workspace_mib: int | None  # the limit of the builder's scratch memory
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
    path, again = card_path(engine), "build the engine again with export/to_trt.py"
    if engine.is_file() and not path.exists():
        raise Refusal(f"{engine} has no card: {path.name} is not beside it; copy it there, or {again}")
    record = read_object(read_whole(path), str(path), todo=again)
    if record.get("format") != FORMAT:
        raise Refusal(f"{path}: format is not {FORMAT}; {again}")
    kinds = {field.name: field.type for field in fields(EngineCard)}
    if missing := [name for name in kinds if name not in record]:
        raise Refusal(f"{path} lacks {', '.join(missing)}; {again}")
    values = {name: record[name] for name in kinds}
    wrong = wrong_fields(values, kinds)
    if not wrong and not 1 <= values["batch"][0] <= values["batch"][1] <= values["batch"][2]:
        wrong = [f"batch cannot be {values['batch']!r}"]
    if wrong:
        raise Refusal(f"{path}: {'; '.join(wrong)}; {again}")
    try:
        values["signature"] = Signature.from_dict(values["signature"])
    except (TypeError, KeyError) as error:
        raise Refusal(f"{path}: signature is damaged ({error}); {again}") from error
    lists = {name: tuple(values[name]) for name in ("batch", "compute_capabilities")}
    return EngineCard(**{**values, **lists, "spec": Spec.from_dict(values["spec"])})
