import numpy as np
import onnx
import pytest
from foreign import SHEET, write_with_nan
from onnx import TensorProto, helper, numpy_helper

from common.files import sha256
from common.refusal import Refusal
from export.graphs.onnx_file import read_onnx
from export.runtimes.onnx_session import OnnxSession


def change_weight(path, name, place, value):
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[place] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)


def test_a_file_of_ours_says_what_it_is(write_onnx, make_spec):
    _, path = write_onnx()
    file = read_onnx(path)
    assert (file.name, file.spec, file.sha256) == ("DiracNet-10-0.25", make_spec(), sha256(path.read_bytes()))
    assert (file.signature.input_name, file.signature.dtype, file.signature.shape) == (
        "images",
        "uint8",
        (None, 8, 8, 3),
    )
    assert (file.signature.output_name, file.output_dtype, file.opset) == ("logits", "float32", 19)
    assert (file.provenance["training"], file.graph.weight_files) == ({"dataset": "none"}, ())


def test_every_weight_that_is_not_finite_is_named(write_onnx):
    _, path = write_onnx()
    change_weight(path, "stem.conv.weight", 3, np.nan)
    change_weight(path, "fc.bias", [0, 1], -np.inf)
    with pytest.raises(
        Refusal, match=r"NaN or infinite weights in stem\.conv\.weight \(1 of \d+\), fc\.bias \(2 of 10\)"
    ):
        read_onnx(path)


@pytest.mark.parametrize(
    "kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.FLOAT8E4M3FN]
)
def test_weights_of_every_float_type_are_looked_at(write_foreign, kind):
    path = write_foreign()
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("odd", kind, [2], [1.0, np.nan]))
    onnx.save(model, path)
    with pytest.raises(Refusal, match=r"in odd \(1 of 2\)"):
        read_onnx(path)


def test_constants_of_nodes_are_looked_at_too(tmp_path):
    with pytest.raises(Refusal, match=r"NaN or infinite weights in nan \(1 of 1\)"):
        read_onnx(write_with_nan(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHEET)
def test_a_file_is_the_same_classifier_to_every_command(name, tmp_path):
    path = SHEET[name](tmp_path).path
    file, session = read_onnx(path), OnnxSession(path)
    assert (file.spec, file.sha256, file.name) == (session.model.spec, session.model.digest, session.model.name)
    assert file.signature.reading == session.model.reading


def test_weights_in_files_of_their_own_are_read_and_missed(write_onnx):
    _, path = write_onnx()
    inside = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    file = read_onnx(path)
    assert file.graph.weight_files == ("weights.bin",)
    for tensor in file.model.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), inside[tensor.name])
    (path.parent / "weights.bin").unlink()
    with pytest.raises(Refusal, match=r"plain\.onnx lacks its weights, weights\.bin: put them beside it"):
        read_onnx(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x08\x09"])
def test_a_file_that_is_no_onnx_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "plain.onnx").write_bytes(content)
    with pytest.raises(Refusal, match=r"is not a valid ONNX file: .*; export it again") as refusal:
        read_onnx(tmp_path / "plain.onnx")
    assert "\n" not in str(refusal.value)


def test_a_truncated_file_is_refused(write_onnx):
    _, path = write_onnx()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Refusal, match="is not a valid ONNX file"):
        read_onnx(path)


@pytest.mark.parametrize(
    ("shape", "kind", "num_classes", "message"),
    [
        (("N", 3, "H", "W"), TensorProto.FLOAT, 4, "export it with a fixed height, width and channels"),
        (("N", 3, 6, 5), TensorProto.DOUBLE, 4, "takes float64; images must be uint8"),
        (("N", 6, 5, 2), TensorProto.FLOAT, 4, "images have 1 or 3 channels"),
        (("N", 3, 6, 5), TensorProto.FLOAT, 1, r"outputs are y float32 \['N', 1\]; a classifier's is \[N, K\]"),
    ],
)
def test_a_net_that_is_no_image_classifier_is_refused(write_foreign, shape, kind, num_classes, message):
    with pytest.raises(Refusal, match=message):
        read_onnx(write_foreign(shape, kind, num_classes))


def test_a_net_with_two_outputs_and_labels_that_do_not_fit_are_refused(write_onnx):
    _, path = write_onnx()
    whole = path.read_bytes()
    model = onnx.load(path)
    (entry,) = (entry for entry in model.metadata_props if entry.key == "spec")
    entry.value = entry.value.replace('"label 0", ', "")
    onnx.save(model, path)
    with pytest.raises(Refusal, match="its spec has 9 labels, its graph 10 logits"):
        read_onnx(path)
    path.write_bytes(whole)
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Neg", ["logits"], ["negated"]))
    model.graph.output.append(helper.make_tensor_value_info("negated", TensorProto.FLOAT, ["N", 10]))
    onnx.save(model, path)
    with pytest.raises(Refusal, match="has the outputs logits, negated; choose the one that holds the classes"):
        read_onnx(path)
