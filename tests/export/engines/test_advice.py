"""Graphs that the real parser of tensorrt_rtx refuses, and what their owner is told."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from common.refusal import Refusal
from export.engines import engine
from export.engines.advice import build_advice
from export.engines.engine import BuildOptions, build_engine

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")

node = helper.make_node
KERNEL = np.ones((4, 3, 3, 3), np.float32)
# From x [N, 3, 8, 8] and its convolution c to logits y [N, 4].
TAIL = (node("GlobalAveragePool", ["c"], ["g"], name="pool"), node("Flatten", ["g"], ["y"], name="flatten"))


def conv(*inputs, name="conv"):
    return node("Conv", list(inputs), ["c"], name=name, pads=[1] * 4)


def save(path, nodes, *, kind=TensorProto.FLOAT, shape=("N", 3, 8, 8), out=TensorProto.FLOAT, opset=19, **weights):
    """A graph of `nodes` from x to logits y [N, 4]."""
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", out, ["N", 4])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


@pytest.fixture
def refusal(tmp_path):
    """What is said of a graph of `nodes` and `weights` that reads x."""

    def build(nodes, **fields):
        save(tmp_path / "odd.onnx", nodes, **fields)
        with pytest.raises(Refusal) as refused:
            build_engine(tmp_path / "odd.onnx", batch=(1, 2, 4))
        text = str(refused.value)
        assert "\n" not in text
        assert "/_src/" not in text
        return text.removeprefix(f"{tmp_path / 'odd.onnx'} cannot be built by tensorrt_rtx: ")

    return build


def test_uint8_may_be_read_by_cast_alone(refusal):
    text = refusal(
        [
            node("Transpose", ["x"], ["t"], name="first", perm=[0, 3, 1, 2]),
            node("Cast", ["t"], ["f"], name="cast", to=TensorProto.FLOAT),
            node("Slice", ["x", "zero", "one"], ["s"], name="second"),
            node("Cast", ["s"], ["unused"], name="other cast", to=TensorProto.FLOAT),
            conv("f", "w"),
            *TAIL,
        ],
        kind=TensorProto.UINT8,
        shape=("N", 8, 8, 3),
        w=KERNEL,
        zero=np.array([0]),
        one=np.array([1]),
    )
    assert text == (
        "Transpose 'first' (uint8), Slice 'second' (uint8, int64, int64): reads uint8, which in TensorRT only Cast "
        "can; do: cast to float first, then transpose and compute"
    )


def test_all_biases_that_are_quantized_to_int32_are_named(refusal):
    dequantized = [node("DequantizeLinear", [f"b{i}", "s"], [f"f{i}"], name=f"bias{i}") for i in range(2)]
    nodes = [
        *dequantized,
        node("Conv", ["x", "w", "f0"], ["d"], name="conv0", pads=[1] * 4),
        node("Conv", ["d", "v", "f1"], ["c"], name="conv1", pads=[1] * 4),
        *TAIL,
    ]
    biases = {f"b{i}": np.ones(4, np.int32) for i in range(2)}
    text = refusal(nodes, w=KERNEL, v=np.ones((4, 4, 3, 3), np.float32), s=np.float32(1), **biases)
    assert text.startswith(
        "DequantizeLinear 'bias0' (int32, float32), DequantizeLinear 'bias1' (int32, float32): its bias is quantized"
    )
    assert text.endswith(
        "--target tensorrt (export/to_onnx.py), or with QuantizeBias=False in ONNX Runtime's quantizer"
    )


def test_a_zero_point_that_is_not_zero_is_named_in_both_quantizers(refusal):
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        node("DequantizeLinear", ["q", "s", "z"], ["f"], name="dq"),
        conv("f", "w"),
        *TAIL,
    ]
    text = refusal(nodes, w=KERNEL, s=np.float32(1), z=np.int8(12))
    assert text.startswith(
        "QuantizeLinear 'q' (float32, float32, int8), DequantizeLinear 'dq' (int8, float32, int8): "
        "its zero point is not 0; do: export with --precision int8 --target tensorrt (export/to_onnx.py), or with Activ"
    )


def test_all_weights_that_are_quantized_to_uint8_are_named(refusal):
    dequantized = [node("DequantizeLinear", [f"w{i}", "s"], [f"f{i}"], name=f"weight{i}") for i in range(2)]
    nodes = [*dequantized, node("Conv", ["x", "f0"], ["d"], pads=[1] * 4), conv("d", "f1"), *TAIL]
    text = refusal(nodes, s=np.float32(1), w0=np.ones((4, 3, 3, 3), np.uint8), w1=np.ones((4, 4, 3, 3), np.uint8))
    assert text.startswith(
        "DequantizeLinear 'weight0' (uint8, float32), DequantizeLinear 'weight1' (uint8, float32): "
        "its weights are quantized to uint8"
    )


@pytest.mark.parametrize("weights", [{"z": np.uint8(0)}, {"z": np.uint8(128)}, {}])
def test_unsigned_activations_which_tensorrt_would_cut_off_are_refused(refusal, weights):
    nodes = [
        node("QuantizeLinear", ["x", "s", *weights], ["q"], name="q"),
        node("DequantizeLinear", ["q", "s", *weights], ["f"], name="dq"),
        conv("f", "w"),
        *TAIL,
    ]
    text = refusal(nodes, w=KERNEL, s=np.float32(1), **weights)
    assert text.startswith("QuantizeLinear 'q' (float32, float32")
    assert "quantizes to uint8, which TensorRT reads as int8" in text
    assert text.count("do: ") == 1


def test_integer_operators_of_onnx_runtime_are_told_apart(refusal):
    nodes = [
        node("QLinearAdd", ["x", "s", "z", "x", "s", "z", "s", "z"], ["a"], name="add", domain="com.microsoft"),
        node("ConvInteger", ["i", "i"], ["p"], name="integer"),
        node("Det", ["x"], ["d"], name="det"),
        conv("x", "w"),
        *TAIL,
    ]
    text = refusal(nodes, w=KERNEL, i=np.ones((1, 3, 3, 3), np.uint8), s=np.float32(1), z=np.int8(0))
    assert text.startswith("QLinearAdd 'add' (")
    assert "ConvInteger 'integer' (uint8, uint8): computes in integers, which only ONNX Runtime does; do: " in text
    assert text.count("do: ") == 2
    assert "Det 'det' (float32): TensorRT has no such operator" in text


def test_a_weakly_typed_graph_names_every_node_that_mixes_types(refusal):
    text = refusal(
        [
            node("Add", ["x", "half"], ["a"], name="add"),
            conv("x", "w", name="group0.block1.conv"),
            *TAIL,
        ],
        w=KERNEL.astype(np.float16),
        half=np.float16(0.5),
    )
    assert text.startswith(
        "Add 'add' (float32, float16), Conv 'group0.block1.conv' (float32, float16): its inputs differ"
    )
    assert "do: put a Cast before it, or export the whole net in one precision" in text


def test_operators_that_tensorrt_lacks_are_listed_together(refusal):
    nodes = [
        node("Det", ["x"], ["d"], name="det"),
        node("NonZero", ["x"], ["n"]),
        node("StringNormalizer", ["x"], ["t"], name="text"),
        conv("x", "w"),
        *TAIL,
    ]
    text = refusal(nodes, w=KERNEL)
    assert text.startswith(
        "Det 'det' (float32), StringNormalizer 'text' (float32): TensorRT has no such operator; do: "
    )
    text = refusal([node("NonZero", ["x"], ["n"]), conv("x", "w"), *TAIL], w=KERNEL)
    assert text.startswith("NonZero that writes 'n' (float32): TensorRT has no such operator; do: ")


def test_a_node_inside_a_function_is_named_without_that_of_the_same_number_outside(tmp_path):
    inner = [node("Identity", ["x"], ["i"]), node("Det", ["i"], ["c"], name="inner")]
    function = helper.make_function("my", "F", ["x"], ["c"], inner, [helper.make_opsetid("", 19)])
    graph = helper.make_graph(
        [node("F", ["x"], ["c"], name="outer", domain="my"), *TAIL],
        "odd",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("my", 1)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=[function]), tmp_path / "function.onnx"
    )
    with pytest.raises(Refusal, match="tensorrt_rtx: Det 'inner': TensorRT has no such operator"):
        build_engine(tmp_path / "function.onnx", batch=(1, 2, 4))


def test_an_objection_to_no_single_node_is_one_to_the_graph(refusal):
    text = refusal([conv("x", "w"), *TAIL], w=KERNEL, text=np.array(["odd"], object))
    assert text.startswith("the graph: TensorRT cannot read its weight text; do: keep weights to float, ")


def test_a_type_that_tensorrt_lacks_is_named(refusal, capfd):
    nodes = [
        node("Cast", ["x"], ["t"], name="to text", to=TensorProto.STRING),
        node("Cast", ["t"], ["f"], name="back", to=TensorProto.FLOAT),
        conv("f", "w"),
        *TAIL,
    ]
    assert refusal(nodes, w=KERNEL).startswith("Cast 'to text' (float32): TensorRT has no such type; do: keep to float")
    assert "STRING" in capfd.readouterr().err  # the library prints it by itself


def test_other_messages_are_told_in_the_librarys_words_without_its_sources(refusal):
    text = refusal([conv("x", "w"), *TAIL], shape=("N", 1, 8, 8), w=KERNEL)
    assert text == (
        "Conv 'conv' (float32, float32): Kernel weight dimension failed to broadcast to input; "
        "do: change what the message names, and export the net again"
    )
    resize = node("Resize", ["x", "", "s"], ["r"], mode="cubic", coordinate_transformation_mode="half_pixel_symmetric")
    text = refusal([resize, conv("r", "w"), *TAIL], w=KERNEL, s=np.array([1, 1, 2, 2], np.float32))
    assert text.startswith("Resize that writes 'r' (float32, float32): TensorRT only supports half_pixel, ")


@pytest.mark.parametrize("opset", [8, 99])
def test_an_opset_that_tensorrt_does_not_document_is_refused(refusal, opset):
    text = refusal([conv("x", "w"), *TAIL], w=KERNEL, opset=opset)
    assert text.endswith(f"has opset {opset}; TensorRT knows 9 to 25: export it with one of these")


def test_a_build_for_turing_says_why_it_fails(write_onnx):
    _, path = write_onnx()
    message = "compute capability 7.5 has no kernel for fc in this precision; do: leave 7.5 out"
    with pytest.raises(Refusal, match=message):
        build_engine(path, batch=(1, 2, 4), options=BuildOptions(compute_capabilities=("7.5",)))


def test_fp8_is_built_for_gpus_that_have_it(tmp_path):
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    quantizers = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        node("DequantizeLinear", ["q", "s", "z"], ["f"], name="dq"),
    ]
    path = tmp_path / "fp8.onnx"
    save(path, [*quantizers, conv("f", "w"), *TAIL], w=KERNEL, s=np.float32(1))
    model = onnx.load(path)
    model.graph.initializer.append(zero)
    onnx.save(model, path)
    card = build_engine(path, batch=(1, 2, 4)).card
    assert (card.precision, card.compute_capabilities[0]) == ("fp8", "8.9")
    with pytest.raises(Refusal, match=r"GPUs of sm80 have no fp8_e4m3; do: name only others with --compute-capability"):
        build_engine(path, batch=(1, 2, 4), options=BuildOptions(compute_capabilities=("8.0", "8.9")))


def test_turing_runs_a_classifier_in_fp16(tmp_path):
    nodes = [conv("x", "w"), TAIL[0], node("Flatten", ["g"], ["f"]), node("Gemm", ["f", "m"], ["y"], name="fc")]
    weights = {"w": KERNEL.astype(np.float16), "m": np.ones((4, 4), np.float16)}
    save(tmp_path / "half.onnx", nodes, kind=TensorProto.FLOAT16, out=TensorProto.FLOAT16, **weights)
    options = BuildOptions(compute_capabilities=("8.9", "7.5"))
    card = build_engine(tmp_path / "half.onnx", batch=(1, 2, 4), options=options).card
    assert (card.compute_capabilities, card.precision, card.output_dtype) == (("7.5", "8.9"), "fp16", "float16")


@pytest.mark.slow
def test_a_build_without_enough_workspace_asks_for_more(write_onnx):
    _, path = write_onnx(width=8.0, size=64)
    with pytest.raises(Refusal, match="too little memory for its scratch space; do: give a larger --workspace"):
        build_engine(path, batch=(1, 64, 256), options=BuildOptions(workspace_mib=1))


def test_a_version_compatible_build_without_the_lean_runtime_says_what_to_install(write_onnx, monkeypatch):
    """tensorrt_rtx has no such runtime, so its library fails as tensorrt does where that is not installed."""
    monkeypatch.setattr(engine, "_refuse_options", lambda *_: None)
    _, path = write_onnx()
    with pytest.raises(Refusal, match="lean runtime, which is not installed here; do: pip install tensorrt-lean"):
        build_engine(path, batch=(1, 2, 4), options=BuildOptions(version_compatible=True))


def test_an_unknown_build_error_is_told_in_short():
    message = "IBuilder::build: Error Code 1: Odd ([x.cpp:1: f] it broke. In compileGraph at /_src/o.cpp:2012)"
    assert build_advice(message).startswith("[x.cpp:1: f] it broke; do: ")
