"""The outputs of a graph's nodes in ONNX Runtime on the CPU, and whether they stay in float16's range."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.compare import BATCH_SIZE
from export.runtimes.offline import cpu_session


def observer(
    model: onnx.ModelProto, names: Sequence[str], dtype: int, folder: Path | None = None
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """From a graph's input to its tensors `names`, which are of an ONNX type.

    `folder` holds the weights that are not in the model.
    """
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    observed.graph.output.extend(helper.make_tensor_value_info(name, dtype, None) for name in names)
    session = cpu_session(observed.SerializeToString(), weights_folder=folder)
    input_name = session.get_inputs()[0].name
    return lambda x: dict(zip(names, map(np.asarray, session.run(list(names), {input_name: x})), strict=True))


def first_overflow(model: onnx.ModelProto, x: np.ndarray, folder: Path | None = None) -> str | None:
    """The first node whose float16 output is not finite for the graph's input `x`, or None.

    Kernels of the CPU keep float32 between nodes; as an output of the graph, every tensor is rounded to float16, which
    is infinite beyond 65,504. `folder` holds the weights that are not in the model.
    """
    typed = onnx.shape_inference.infer_shapes(model).graph
    halves = {value.name for value in typed.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    nodes = {name: node.name or name for node in model.graph.node for name in node.output if name in halves}
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    size = fixed or BATCH_SIZE
    end = len(x) // fixed * fixed if fixed else len(x)  # images that do not fill a fixed batch are left out
    observe = observer(model, [*nodes], TensorProto.FLOAT16, folder)
    values = (pair for start in range(0, end, size) for pair in observe(x[start : start + size]).items())
    return next((nodes[name] for name, value in values if not np.isfinite(value).all()), None)
