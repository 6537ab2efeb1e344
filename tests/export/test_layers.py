import dataclasses
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from common.refusal import Refusal
from export import artefacts
from export.artefacts import open_artefact
from export.compare import TOLERANCES
from export.graphs.graph import to_onnx
from export.pairs import compare_layers, draw_layers
from export.runtimes.onnx_session import OnnxSession
from fold.graph import fold
from fold.lower import lower
from fold.lowerings import LOWERINGS
from fold.plain import save_plain

BENT = "group1.block0.conv"


@pytest.fixture
def write(tmp_path, make_net, make_spec):
    """The same small net as files: write(name, bend=..., lowering=..., precision=...)."""

    def write(name, *, bend=0.0, lowering="concat", precision="fp32", seed=0, **fields):
        plain = fold(make_net(seed, **fields)).float()
        if bend:
            plain.graph[BENT].tensors["weight"].mul_(1 + bend)
        path, spec = tmp_path / name, make_spec(**fields)
        if path.suffix == ".safetensors":
            save_plain(path, plain, spec, {})
        else:
            provenance = {"export": {"lowering": lowering}}
            model = to_onnx(lower(plain, lowering), spec, provenance, precision=precision)
            path.write_bytes(model.SerializeToString())
        return path

    return write


def compared(reference, candidate, pixels):
    return compare_layers(open_artefact(reference), open_artefact(candidate), pixels)


@pytest.mark.parametrize("name", ["bent.safetensors", "bent.onnx"])
def test_a_bent_layer_is_named_and_those_before_it_are_fine(write, images, name):
    result = compared(write("plain.safetensors"), write(name, bend=0.01), images())
    assert result.first_beyond() == BENT
    names = [layer.name for layer in result.layers]
    assert all(layer.within_tolerance for layer in result.layers[: names.index(BENT)])
    assert names[0] == "stem.conv"
    assert names[-1] == "fc"


@pytest.mark.slow
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_lowering_is_compared_by_the_plain_nets_names(write, images, lowering):
    reference = write("plain.safetensors", depth=16)
    result = compared(reference, write("lowered.onnx", depth=16, lowering=lowering), images())
    assert result.first_beyond() is None
    assert len(result.layers) == 14
    bent = compared(reference, write("bent.onnx", depth=16, lowering=lowering, seed=1), images())
    assert bent.first_beyond() == "stem.conv"


@pytest.mark.parametrize(
    "fields", [{}, {"family": "wrn", "width": 1.0, "nonlinearity": "relu", "parameterization": "plain"}]
)
def test_half_precision_has_its_own_tolerance(write, images, fields):
    result = compared(write("plain.onnx", **fields), write("half.onnx", precision="fp16", **fields), images())
    assert result.first_beyond() is None
    assert {layer.limit for layer in result.layers} == {TOLERANCES["fp16"].largest}
    assert max(layer.error for layer in result.layers) > 1e-4


def test_layers_of_an_integer_graph_are_read_in_units_of_the_net():
    constants = {"conv.scale": np.float32(0.5), "conv.zero": np.uint8(4)}
    value = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    expected = (np.arange(12).reshape(1, 2, 2, 3).transpose(0, 3, 1, 2) - 4) / 2
    assert np.array_equal(artefacts._dequantize("conv", value, constants), expected)


def test_an_engine_shows_the_layers_of_its_own_onnx_file_and_of_no_other(write, images, monkeypatch):
    path = write("plain.onnx")
    onnx_form = open_artefact(path)
    card = SimpleNamespace(precision="fp16", onnx_sha256=onnx_form.digest)
    runtime = SimpleNamespace(model=OnnxSession(path).model)
    monkeypatch.setattr("export.artefacts.read_card", lambda path: card)
    monkeypatch.setattr("export.runtimes.tensorrt_engine.TensorRTEngine", lambda path, device: runtime)
    engine = open_artefact(path.with_suffix(".engine"))
    assert engine.precision == "fp16"
    result = compare_layers(onnx_form, engine, images())
    assert result.first_beyond() is None
    assert result.candidate == str(path.with_suffix(".engine"))
    write("plain.onnx", seed=1)
    with pytest.raises(Refusal, match=r"only its ONNX shows its layers, and .*plain\.onnx is another file"):
        engine.layers(images())


def test_nets_without_a_common_layer_are_refused(write, images):
    one, other = open_artefact(write("plain.onnx")), open_artefact(write("other.onnx"))
    other = dataclasses.replace(other, layers=lambda images: {"elsewhere": images})
    with pytest.raises(Refusal, match="have no layer of the same name"):
        compare_layers(one, other, images())


@pytest.mark.slow
def test_the_picture_is_a_png_and_an_error_of_zero_has_a_place_in_it(write, images):
    path = write("plain.onnx")
    assert draw_layers([compared(path, path, images())]).startswith(b"\x89PNG")


def test_unknown_files_and_precisions_are_refused(write, tmp_path):
    with pytest.raises(Refusal, match="is not an artefact of this project"):
        open_artefact(tmp_path / "photo.png")
    form = open_artefact(write("plain.onnx"))
    with pytest.raises(Refusal, match=r"computes in int4; known are fp32, fp16, bf16, int8, fp8"):
        dataclasses.replace(form, precision="int4")


def test_a_graph_with_quantised_weights_is_int8(write, tmp_path):
    model = onnx.load(write("plain.onnx"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "stem.conv.weight")
    values = numpy_helper.to_array(weight)
    scale = np.abs(values).max() / 127
    weight.CopyFrom(numpy_helper.from_array(np.rint(values / scale).astype(np.int8), "stem.conv.weight"))
    model.graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), "scale"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["stem.conv.weight", "scale"], ["dequantised"]))
    next(node for node in model.graph.node if node.name == "stem.conv").input[1] = "dequantised"
    onnx.save(model, tmp_path / "int8.onnx")
    assert open_artefact(tmp_path / "int8.onnx").precision == "int8"
