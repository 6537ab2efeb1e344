"""Sums of two eight-bit products in 16 bits: simulated, bounded from the weights, and asked of the processor."""

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from export.eight_bits.calibrate import observe, ranges
from export.eight_bits.integer import quantize_filters, to_integer_onnx
from export.eight_bits.qdq import to_qdq_onnx
from export.graphs.graph import to_onnx
from export.runtimes import saturation
from export.runtimes.onnx_session import quiet_session
from export.runtimes.saturation import may_saturate, warning
from fold.graph import fold
from fold.lower import lower

INT16 = np.iinfo(np.int16)


def saturating_sums(weights, activations, order):
    """[N_o, N] int8 · [N] uint8 as a processor without VNNI adds it: pairs in `order`, each clipped to 16 bits."""
    products = (weights.astype(np.int64) * activations.astype(np.int64))[:, order]
    if products.shape[1] % 2:
        products = np.pad(products, ((0, 0), (0, 1)))
    return np.clip(products[:, ::2] + products[:, 1::2], INT16.min, INT16.max).sum(axis=1)


def assert_equal_in_both_arithmetics(weights, seed):
    """For the activations that come closest to the limit, random ones, and any order of pairs."""
    generator, flat = np.random.default_rng(seed), weights.reshape(len(weights), -1)
    num = flat.shape[1]
    orders = [np.arange(num), generator.permutation(num), np.argsort(flat[0]), np.argsort(-flat[-1])]
    for activations in (np.full(num, 255), generator.integers(0, 256, num), np.where(flat[0] > 0, 255, 0)):
        exact = flat.astype(np.int64) @ activations
        for order in orders:
            np.testing.assert_array_equal(saturating_sums(flat, activations, order), exact)


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-4, 4, width=32)),
    st.integers(0, 2**32 - 1),
)
@example(np.array([[1e-45]], np.float32), 0)  # a scale that is 0 in float32
@example(np.array([[1.4e-43, 1.4e-43]], np.float32), 0)  # one that is rounded by a third
def test_no_filter_can_leave_16_bits_whatever_its_weights(weight, seed):
    assert_equal_in_both_arithmetics(quantize_filters(weight)[0], seed)


def test_the_simulation_does_saturate_where_weights_are_whole_range():
    weights = np.full((1, 4), 127, np.int8)
    sums = saturating_sums(weights, np.full(4, 255), np.arange(4))
    assert sums == 2 * INT16.max != 4 * 127 * 255


def test_only_filters_that_would_saturate_get_a_larger_scale():
    lone = np.array([[2.54, 0.0, -1.0, 0.0]], np.float32)
    pair = np.array([[2.54, 2.54, -1.0, 0.0]], np.float32)
    assert quantize_filters(lone)[0].tolist() == [[127, 0, -50, 0]]
    levels, scales = quantize_filters(pair)
    assert scales.tolist() == pytest.approx([0.04])
    assert levels[0, :2].sum() <= 128


@pytest.fixture
def integer_graph(make_net, make_spec, images):
    def make(lowering, kind="onnxruntime", **fields):
        plain, spec = fold(make_net(**fields)).float(), make_spec(**fields)
        lowered = lower(plain, lowering)
        floats = to_onnx(lowered, spec, {})
        reach = ranges(observe(floats, images(8)), "min-max")
        if kind == "tensorrt":
            return to_qdq_onnx(floats, reach, precision="int8")
        return to_integer_onnx(lowered, spec, {}, reach)

    return make


@pytest.mark.parametrize("parameterization", ["dirac", "unnormalized", "delta"])
@pytest.mark.parametrize("lowering", ["concat", "shared", "shared-split", "skip"])
def test_every_integer_graph_gives_the_same_sums_with_and_without_saturation(
    tmp_path, integer_graph, lowering, parameterization
):
    model = integer_graph(lowering, parameterization=parameterization)
    weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name.endswith(".weight")]
    integers = [weight for weight in weights if weight.dtype == np.int8]
    assert len(integers) >= 6
    for seed, weight in enumerate(integers):
        assert_equal_in_both_arithmetics(weight, seed)
    assert may_saturate(tmp_path, model.SerializeToString()) == []


def test_a_planted_pair_is_found_by_the_name_of_its_layer(tmp_path, integer_graph):
    model = integer_graph("concat")
    model.metadata_props.add(key="cannot_saturate", value="true")  # not believed
    tensor = next(t for t in model.graph.initializer if t.name == "group1.block0.conv.weight")
    weight = numpy_helper.to_array(tensor).copy()
    weight[0, 0, 0, 0], weight[0, -1, 2, 2] = 127, 2
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    assert may_saturate(tmp_path, model.SerializeToString()) == ["group1.block0.conv"]


def multiplication(kind, weight, domain="", num_inputs=1):
    """A graph of one integer node whose weights are int8, or what `weight` holds."""
    stored = [numpy_helper.from_array(weight, "w")] if weight is not None else []
    names = {"QLinearConv": ["x", "s", "z", "w", "s", "z", "s", "z"], "QLinearMatMul": ["x", "s", "z", "w"]}
    node = helper.make_node(kind, names.get(kind, ["x", "w"]), ["y"], name="layer", domain=domain)
    graph = helper.make_graph([node], "g", [], [], stored)
    return helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize("kind", ["QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger"])
def test_filters_of_every_node_are_read_along_their_own_axis(tmp_path, kind):
    safe = np.full((2, 3), 64, np.int8)
    along = np.array([[127, 1, 0], [0, 0, 127]], np.int8)  # rows are safe, and so are columns
    rows = np.array([[100, 100, 0], [0, 0, 0]], np.int8)  # as filters of rows only is it unsafe
    assert may_saturate(tmp_path, multiplication(kind, safe)) == []
    assert may_saturate(tmp_path, multiplication(kind, along)) == []
    assert may_saturate(tmp_path, multiplication(kind, rows)) == (["layer"] if "Conv" in kind else [])
    assert may_saturate(tmp_path, multiplication(kind, rows.T.copy())) == ([] if "Conv" in kind else ["layer"])


@pytest.mark.parametrize(
    "pair", [(127, 1), (64, 64), (-127, -1), (-128, 0), (127, 2), (65, 64), (-127, -2), (-128, -1)]
)
def test_a_pair_is_called_safe_exactly_where_its_sum_stays_in_16_bits(tmp_path, pair):
    weight, pixels = np.array([pair], np.int8), np.full(2, 255)
    stays = saturating_sums(weight, pixels, np.arange(2)) == 255 * sum(pair)
    assert may_saturate(tmp_path, multiplication("QLinearConv", weight)) == ([] if stays else ["layer"])


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("QLinearConv", np.full((2, 3), 1, np.uint8)),
        ("QLinearConv", None),  # weights that are computed
        ("QLinearConv", np.full(3, 1, np.int8)),
        ("QGemm", np.full((2, 3), 1, np.int8)),
        ("DynamicQuantizeMatMul", np.full((2, 3), 1, np.uint8)),
        ("DynamicQuantizeMatMulInteger", np.full((2, 3), 1, np.int8)),
    ],
)
def test_what_is_not_known_cannot_be_shown_not_to_saturate(tmp_path, kind, weight):
    assert may_saturate(tmp_path, multiplication(kind, weight)) == ["layer"]


def test_dequantized_weights_of_convolutions_count_since_runtimes_fuse_them(tmp_path, integer_graph):
    model = integer_graph("skip", kind="tensorrt")
    levels = next(t for t in model.graph.initializer if t.name == "group0.block0.conv.weight")
    weight = numpy_helper.to_array(levels).copy()
    weight[0, 0, 0, :2] = 127
    levels.CopyFrom(numpy_helper.from_array(weight, levels.name))
    assert "group0.block0.conv" in may_saturate(tmp_path, model.SerializeToString())


def dequantized(kind, weight, *between, **how):
    """A graph of one float node whose weights are dequantised, with other nodes between."""
    names = ["w", "a", "b", "c"]
    nodes = [helper.make_node("DequantizeLinear", ["levels", "s", "z"], ["w"])]
    nodes += [helper.make_node(op, names[at : at + 1], names[at + 1 : at + 2]) for at, op in enumerate(between)]
    nodes.append(helper.make_node(kind, ["x", names[len(between)]], ["y"], name="layer", **how))
    return helper.make_model(helper.make_graph(nodes, "g", [], [], [numpy_helper.from_array(weight, "levels")]))


ROWS = np.array([[100, 100, 0], [0, 0, 0]], np.int8)  # as filters of rows only is it unsafe


@pytest.mark.parametrize(
    ("model", "is_safe"),
    [
        (dequantized("Gemm", ROWS), True),
        (dequantized("Gemm", ROWS, transB=1), False),
        (dequantized("Gemm", ROWS.T.copy()), False),
        (dequantized("MatMul", ROWS, "Transpose"), False),
        (dequantized("MatMul", ROWS, "Identity", "Reshape", "Transpose"), False),
        (dequantized("MatMul", ROWS // 2, "Transpose"), True),  # no two of all weights
        (dequantized("MatMul", ROWS.T.copy(), "Relu"), True),  # which no runtime fuses
    ],
)
def test_dequantized_weights_of_matrices_are_read_as_they_are_multiplied(tmp_path, model, is_safe):
    assert may_saturate(tmp_path, model.SerializeToString()) == ([] if is_safe else ["layer"])


def test_a_circle_in_a_damaged_graph_ends(tmp_path):
    nodes = [helper.make_node("Transpose", ["w"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    assert may_saturate(tmp_path, helper.make_model(helper.make_graph(nodes, "g", [], [])).SerializeToString()) == []


@pytest.mark.parametrize(("kind", "how"), [("Gemm", {"transB": 1}), ("MatMul", {})])
def test_onnx_runtime_does_multiply_such_matrices_in_eight_bits(tmp_path, kind, how):
    between = () if kind == "Gemm" else ("Transpose",)
    graph = dequantized(kind, np.full((16, 64), 127, np.int8), *between, **how).graph
    nodes = [helper.make_node("QuantizeLinear", ["images", "s", "u"], ["q"])]
    nodes += [helper.make_node("DequantizeLinear", ["q", "s", "u"], ["x"]), *graph.node]
    nodes += [helper.make_node("QuantizeLinear", ["y", "s", "u"], ["quantized"])]
    values = {"s": np.float32(0.1), "z": np.int8(0), "u": np.uint8(0), "levels": np.full((16, 64), 127, np.int8)}
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 64])
    quantized = helper.make_tensor_value_info("quantized", TensorProto.UINT8, [1, 16])
    made = helper.make_graph(nodes, "g", [images], [quantized], stored)
    model = helper.make_model(made, ir_version=9, opset_imports=[helper.make_opsetid("", 19)])
    path = tmp_path / "fused.onnx"
    quiet_session(model.SerializeToString(), optimized_model_filepath=str(path))
    assert {node.op_type for node in onnx.load(path).graph.node} & {"QGemm", "QLinearMatMul"}
    assert may_saturate(tmp_path, model.SerializeToString()) == ["layer"]


def test_a_float_net_has_nothing_to_saturate(tmp_path, make_net, make_spec):
    assert may_saturate(tmp_path, to_onnx(fold(make_net()).float(), make_spec(), {}).SerializeToString()) == []


def test_the_probe_is_one_multiplication_and_its_answer_is_that_of_this_processor():
    made = onnx.load_from_string(saturation._PROBE)
    assert [node.op_type for node in made.graph.node] == ["MatMulInteger"]
    assert [value.type.tensor_type.elem_type for value in made.graph.input] == [TensorProto.UINT8, TensorProto.INT8]
    assert saturation.saturates() == (convolve_on_this_processor() != 200)


def convolve_on_this_processor():
    """One output of the node that integer graphs are made of, for 64 products 255 · 127: 200 in exact arithmetic."""
    stored = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "w": np.full((16, 64, 1, 1), 127, np.int8),
        "w.zero": np.int8(0),
        "y.scale": np.float32(64 * 255 * 127 / 200),
    }
    names = ["x", "one", "zero", "w", "one", "w.zero", "y.scale", "zero"]
    node = helper.make_node("QLinearConv", names, ["y"], domain="com.microsoft", channels_last=1)
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 4, 4, 64])
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 4, 4, 16])
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], tensors), ir_version=8, opset_imports=opsets)
    session = quiet_session(model.SerializeToString())
    (found,) = session.run(None, {"x": np.full((1, 4, 4, 64), 255, np.uint8)})
    return int(found.flat[0])


@pytest.mark.parametrize("saturates", [True, False])
def test_an_unsafe_file_is_warned_of_only_where_the_processor_saturates(tmp_path, monkeypatch, saturates):
    monkeypatch.setattr(saturation, "saturates", lambda: saturates)
    content = multiplication("QLinearConv", np.full((1, 4), 127, np.int8))
    said = warning(tmp_path / "old-int8.onnx", content)
    assert (said is not None) == saturates
    if said:
        assert "old-int8.onnx may be answered wrongly here" in said
        assert "export it again" in said
    assert warning(tmp_path / "new-int8.onnx", multiplication("QLinearConv", np.full((1, 4), 64, np.int8))) is None


def test_damaged_dimensions_of_a_weight_are_nothing_known(tmp_path):
    """The last number of packed dimensions is cut off."""
    packed = b"\x0a\x01\x80" + b"\x10\x03" + b"\x42\x01w" + b"\x4a\x01\x01"  # dims, data_type, name, raw_data
    model = onnx.load_from_string(multiplication("QLinearConv", None))
    graph = model.graph.SerializeToString() + b"\x2a" + bytes([len(packed)]) + packed
    content = b"\x3a" + bytes([len(graph)]) + graph
    assert len(graph) < 128
    assert may_saturate(tmp_path, content) == ["layer"]
