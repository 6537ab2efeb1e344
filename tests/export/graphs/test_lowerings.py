"""Every lowering of every family in ONNX Runtime, in float32 and float16."""

import numpy as np
import onnx
import pytest
import torch

from common.refusal import Refusal
from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import ort
from fold.graph import fold
from fold.lower import lower
from fold.lowerings import LOWERINGS

# As a share of the largest logit. Float16 rounds to 2^-11; over L layers independent roundings add up to
# sqrt(L) 2^-11, 3e-3 for the 34 of the deepest net here, and each layer rounds weights and activations.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_onnx_runtime_answers_as_the_dirac_net(make_net, make_spec, images, row, lowering, precision):
    net, pixels = make_net(**row), images(5, row.get("size", 8))
    with torch.no_grad():
        expected = net.double()(torch.from_numpy(pixels)).numpy()
    model = to_onnx(lower(fold(net), lowering), make_spec(**row), {}, precision=precision)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": pixels})
    assert logits.dtype == np.float32
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCES[precision], f"{lowering} in {precision} is off by {error:.1e}: export/graphs/graph.py"


def test_a_float16_graph_keeps_pixels_and_logits_out_of_float16(make_net, make_spec):
    model = onnx.shape_inference.infer_shapes(to_onnx(fold(make_net()), make_spec(), {}, precision="fp16"))
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert kinds["normalize"] == single
    assert kinds["normalize.rounded"] == kinds["stem.conv"] == kinds["group2.block1.conv"] == half
    assert model.graph.output[0].type.tensor_type.elem_type == single
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert stored["fc.weight"] == half
    assert stored["normalize.scale"] == single


def test_weights_beyond_float16_are_refused_by_name(make_net, make_spec):
    net = fold(make_net())
    net.graph["group0.block1.conv"].tensors["weight"][0, 0, 0, 0] = 1e5
    with pytest.raises(Refusal, match=r"group0\.block1\.conv\.weight holds 1e\+05, beyond float16"):
        to_onnx(net, make_spec(), {}, precision="fp16")
