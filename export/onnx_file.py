"""An ONNX file before any library builds it: whole, finite, and what it takes and gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from export.runtimes.header import read_header
from export.runtimes.signature import Signature, generic_spec
from train.files import read_whole, sha256
from train.refusal import Refusal
from train.spec import Spec

FLOATS = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.FLOAT8E4M3FN,
)


@dataclass(frozen=True)
class OnnxFile:
    """A checked classifier, ours or somebody else's."""

    path: Path
    model: onnx.ModelProto
    sha256: str  # of the file itself, without weights that lie beside it
    weight_files: tuple[str, ...]  # relative to the file's folder; () where all weights are inside
    name: str  # "DiracNet-16-1", or the file's stem for a net without our spec
    signature: Signature
    output_dtype: str  # of the logits: "float32", "float16"
    spec: Spec
    provenance: dict[str, Any]

    @property
    def opset(self) -> int:
        return next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))


def read_onnx(path: Path) -> OnnxFile:
    """Read and check a classifier: one input of images, one output of logits [N, K].

    Refuses what is no ONNX, weight files that are missing, weights that are NaN or infinite, and
    inputs and outputs that are no image classifier's.
    """
    content = read_whole(path)
    try:
        model = onnx.load_model_from_string(content)
        weight_files = _weight_files(path, model)
        onnx.checker.check_model(str(path))  # by path: weights may lie in files beside it
        onnx.load_external_data_for_model(model, str(path.parent))
    except Refusal:
        raise
    except Exception as error:  # protobuf and the checker raise hierarchies of their own
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"{path} is no valid ONNX file: {reason}; export it again") from error
    _refuse_what_is_not_finite(path, model)
    signature = _signature(path, model)
    output_dtype, num_classes = _answer(path, model)
    header = read_header(path, content)
    spec = header.spec or generic_spec(signature, num_classes=num_classes)
    if len(spec.labels) != num_classes:
        raise Refusal(
            f"{path}: its spec has {len(spec.labels)} labels, its graph {num_classes} logits; export it again"
        )
    name = spec.name if header.spec else path.stem
    return OnnxFile(path, model, sha256(content), weight_files, name, signature, output_dtype, spec, header.provenance)


def dtype_name(kind: int) -> str:
    """An ONNX element type as numpy spells it: "float32", "uint8"; "unknown" where nothing says it."""
    return "unknown" if kind == TensorProto.UNDEFINED else helper.tensor_dtype_to_np_dtype(kind).name


def listed(names: list[str], most: int = 8) -> str:
    """Names in one line; those beyond `most` are counted."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _weight_files(path: Path, model: onnx.ModelProto) -> tuple[str, ...]:
    outside = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    names = tuple(sorted({ExternalDataInfo(tensor).location for tensor in outside}))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise Refusal(
            f"{path} keeps weights in files of their own, and {', '.join(missing)} is not in {path.parent}; "
            "put them there together, or export the net into one file"
        )
    return names


def _refuse_what_is_not_finite(path: Path, model: onnx.ModelProto) -> None:
    faults = []
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOATS:
            array = numpy_helper.to_array(tensor)
            if num := int(np.count_nonzero(~np.isfinite(array))):
                faults.append(f"{tensor.name} ({num} of {array.size})")
    if faults:
        raise Refusal(f"{path} holds NaN or infinite weights in {listed(faults)}; train or export the net again")


def _signature(path: Path, model: onnx.ModelProto) -> Signature:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise Refusal(f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs, not one of each")
    kind = inputs[0].type.tensor_type
    try:
        dtype: Any = dtype_name(kind.elem_type)
        return Signature(inputs[0].name, model.graph.output[0].name, dtype, _shape(kind))
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from refusal


def _answer(path: Path, model: onnx.ModelProto) -> tuple[str, int]:
    """Element type and number of the logits."""
    kind = onnx.shape_inference.infer_shapes(model).graph.output[0].type.tensor_type
    shape = _shape(kind)
    if len(shape) != 2 or shape[1] is None or shape[1] < 2:
        shown = [size or "N" for size in shape]
        raise Refusal(f"{path} answers {shown}; a classifier answers [N, K], one value for each of its K classes")
    return dtype_name(kind.elem_type), shape[1]


def _shape(kind: Any) -> tuple[int | None, ...]:
    return tuple(size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim)
