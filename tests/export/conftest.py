import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from common.cli import run_command
from export import to_trt
from export.graphs.graph import to_onnx
from fold.graph import fold


@pytest.fixture
def write_onnx(tmp_path, make_net, make_spec):
    """The real road to a small plain.onnx: (Dirac net, path)."""

    def write(**fields):
        net = make_net(**fields)
        model = to_onnx(fold(net), make_spec(**fields), {"training": {"dataset": "none"}})
        path = tmp_path / "plain.onnx"
        path.write_bytes(model.SerializeToString())
        return net, path

    return write


@pytest.fixture
def write_foreign(tmp_path):
    """An ONNX of somebody else's: mean of each channel, times a matrix [C, 4]; no metadata."""

    def write(shape=("N", 3, 6, 5), kind=TensorProto.FLOAT, num_classes=4, matrix=None):
        channels_first = shape[1] in (1, 3)
        num_channels = shape[1] if channels_first else shape[3]
        matrix = np.ones((num_channels, num_classes)) if matrix is None else matrix
        nodes = [
            helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT, name="cast"),
            helper.make_node("ReduceMean", ["cast", "axes"], ["mean"], keepdims=0, name="mean"),
            helper.make_node("MatMul", ["mean", "matrix"], ["y"], name="product"),
        ]
        weights = [
            numpy_helper.from_array(np.array([2, 3] if channels_first else [1, 2], np.int64), "axes"),
            numpy_helper.from_array(matrix.astype(np.float32), "matrix"),
        ]
        graph = helper.make_graph(
            nodes,
            "foreign",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], num_classes])],
            weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        path = tmp_path / "foreign.onnx"
        onnx.save(model, path)
        return path

    return write


@pytest.fixture
def built(write_onnx):
    """The engine of a small plain.onnx, by tensorrt_rtx for batches of 1 to 4, with its card beside it."""
    _, path = write_onnx()
    assert run_command(to_trt.command, to_trt.ToTrtConfig, argv=[str(path), "--batch", "1", "2", "4"]) == 0
    return path.with_suffix(".engine")
