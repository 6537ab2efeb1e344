"""An ONNX file, checked before any library builds it: complete, finite, with a classifier's inputs and outputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common.files import read_whole
from common.refusal import Refusal, first_of, one_line
from common.spec import Spec
from export.model_file.onnx_reader import OnnxGraph, digest_of, find_weights, read_graph, read_header
from export.model_file.reading import NO_HINTS, ReadingHints
from export.model_file.signature import Signature, Value, find_signature, find_spec

FLOATS = [TensorProto.DataType.Value(name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "FLOAT8E4M3FN")]


@dataclass(frozen=True)
class OnnxFile:
    """A checked classifier, of this project or third-party."""

    path: Path
    model: onnx.ModelProto
    sha256: str  # of the file and of the weights that lie beside it
    graph: OnnxGraph
    name: str  # "DiracNet-16-1", or the file's stem for a third-party net
    signature: Signature
    output_dtype: str  # of the logits: "float32", "float16"
    output_shape: tuple[int | None, ...]  # [N, K], or [N, K, 1, 1]
    spec: Spec
    provenance: dict[str, Any]

    @property
    def opset(self) -> int:
        return next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))


def read_onnx(path: Path, hints: ReadingHints = NO_HINTS) -> OnnxFile:
    """Read and check a classifier, see `find_signature`; `hints` say how to read a third-party one.

    Refuses invalid files, missing weight files, weights that are NaN or infinite, and inputs and outputs other than
    an image classifier's.
    """
    content = read_whole(path)
    graph = read_graph(path, content)
    find_weights(path, graph)
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(str(path))  # by path: weights may lie in files beside it
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # protobuf and the checker raise hierarchies of their own
        raise Refusal(f"{path} is not a valid ONNX file: {one_line(error)}; export it again") from error
    bad = ((name, np.count_nonzero(~np.isfinite(array)), array.size) for name, array in _floats(model.graph))
    if faults := [f"{name} ({num} of {size})" for name, num, size in bad if num]:
        raise Refusal(f"{path} holds NaN or infinite weights in {first_of(faults, 8)}; train or export the net again")
    header = read_header(path, content)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [_value(value) for value in model.graph.input if value.name not in weights]
    outputs = [_value(value) for value in onnx.shape_inference.infer_shapes(model).graph.output]
    signature, hints = find_signature(path, header, graph, inputs, outputs, hints)
    (output,) = (value for value in outputs if value.name == signature.output_name)
    if output.num_classes is None:
        raise Refusal(f"{path} gives {output.shown}; export it with a fixed number of classes")
    return OnnxFile(
        path=path,
        model=model,
        sha256=digest_of(path, content),
        graph=graph,
        name=header.spec.name if header.spec else path.stem,
        signature=signature,
        output_dtype=output.dtype,
        output_shape=output.shape,
        spec=find_spec(path, header, signature, hints, output.num_classes),
        provenance=header.provenance,
    )


def dtype_name(kind: int) -> str:
    """An ONNX element type as numpy spells it: "float32", "uint8"; "unknown" where nothing says it."""
    return "unknown" if kind == TensorProto.UNDEFINED else helper.tensor_dtype_to_np_dtype(kind).name


def _floats(graph: onnx.GraphProto) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of a graph by name, what its Constant nodes hold, and the same of the graphs inside its nodes."""
    for tensor in graph.initializer:
        if tensor.data_type in FLOATS:
            yield tensor.name, numpy_helper.to_array(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _floats(attribute.g)
            if node.op_type == "Constant" and attribute.t.data_type in FLOATS:
                yield node.output[0], numpy_helper.to_array(attribute.t)
            if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                yield node.output[0], np.array([attribute.f, *attribute.floats])


def _value(value: onnx.ValueInfoProto) -> Value:
    kind = value.type.tensor_type
    shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim)
    return Value(value.name, dtype_name(kind.elem_type), shape)
