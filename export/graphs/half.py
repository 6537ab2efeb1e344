"""Whether a graph in float16 stays in its range, found on a CPU, whose kernels keep float32 between nodes."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.compare import BATCH_SIZE
from export.runtimes.offline import ort


def first_overflow(model: onnx.ModelProto, x: np.ndarray, folder: Path | None = None) -> str | None:
    """The first node whose float16 output is not finite for the graph's input `x`, or None.

    Every such output is made one of the graph's: ONNX Runtime then rounds it to float16, beyond whose 65,504 it
    is infinite. `folder` is where weights lie that are not in the model.
    """
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    typed = onnx.shape_inference.infer_shapes(model).graph
    halves = {value.name for value in typed.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    nodes = {name: node.name or name for node in model.graph.node for name in node.output if name in halves}
    observed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in nodes)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if folder:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    session = ort.InferenceSession(observed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    input_name = session.get_inputs()[0].name
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    batch = fixed or BATCH_SIZE
    # Of a fixed batch, what does not fill the last one is left out.
    for start in range(0, len(x) // fixed * fixed if fixed else len(x), batch):
        values = session.run(list(nodes), {input_name: x[start : start + batch]})
        for node, value in zip(nodes.values(), values, strict=True):
            if not np.isfinite(np.asarray(value)).all():
                return node
    return None
