"""Files whose words are damaged: refused in one line before they serve, and never an answer of 500."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from starlette.testclient import TestClient

from common.refusal import Refusal
from export.model_file.engine_card import read_card
from serve.config import ServeConfig
from serve.processes.serving import load
from serve.request.access import Access
from serve.request.app import make_app
from serve.request.limits import Limits

DEEP = "[" * 100_000
KEY = {"X-Api-Key": "key"}


def rewrite(path, name, text):
    """The model in `path` with `text` as its metadata entry `name`."""
    model = onnx.load(path)
    entry = next(entry for entry in model.metadata_props if entry.key == name)
    entry.value = text(entry.value) if callable(text) else text
    onnx.save(model, path)


def with_label(label):
    def change(text):
        spec = json.loads(text)
        spec["labels"][0] = label
        return json.dumps(spec)

    return change


def with_field(**fields):
    return lambda text: json.dumps({**json.loads(text), **fields})


def with_image(**fields):
    return lambda text: json.dumps({**json.loads(text), "image": {**json.loads(text)["image"], **fields}})


DAMAGE = {
    "list": ("provenance", "[]", "the provenance in the model's file is not a JSON object"),
    "null": ("provenance", "null", "the provenance in the model's file is not a JSON object"),
    "half": ("provenance", "{", "the provenance in the model's file is not valid JSON"),
    "empty": ("provenance", "", "the provenance in the model's file is not valid JSON"),
    "deep": ("provenance", '{"export":' + DEEP, "is not valid JSON: it is nested deeper than 64"),
    "less deep": ("provenance", '{"a":' + "[" * 65 + "]" * 65 + "}", "is not valid JSON: it is nested deeper than 64"),
    "section": ("provenance", '{"export": []}', "is damaged: export is not a JSON object"),
    "probe": ("provenance", '{"export": {"probe": []}}', r"the record of the export in DiracNet-10-0\.25 is damaged"),
    "seed": ("provenance", '{"export": {"probe": {"seed": -1, "logits": []}}}', "record of the export .* is damaged"),
    "no seed": ("provenance", '{"export": {"probe": {}}}', "record of the export .* is damaged"),
    "ragged": ("provenance", '{"export": {"probe": {"seed": 0, "logits": [[1], []]}}}', "record of the export"),
    "few": (
        "provenance",
        '{"export": {"precision": "fp32", "probe": {"seed": 0, "logits": [[1]]}}}',
        "record of the export .* is damaged",
    ),
    "not a number": ("provenance", '{"training": {"loss": NaN}}', "says of itself cannot be shown"),
    "half a character": ("provenance", '{"training": {"a": "\\ud800"}}', r"it holds half a character: '\\ud800'"),
    "label": ("spec", with_label("\ud800"), "the model's spec is not valid JSON: it holds half a character"),
    "spec": ("spec", DEEP, "the model's spec is not valid JSON: it is nested deeper than 64"),
    "depth": ("spec", with_field(depth=10**9), "depth goes up to 1,000"),
    "width": ("spec", with_field(width=1e300), "width to 1,000"),
    "height": ("spec", with_image(height=10**9, resize=10**9), "images may be 8,192 pixels high and wide"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_word_is_refused_at_the_start(artefact, name):
    entry, text, message = DAMAGE[name]
    rewrite(artefact, entry, text)
    with pytest.raises(Refusal, match=message) as refused:
        load(ServeConfig((artefact,), runtime="onnxruntime"))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", ["deep", "list", "label", "not a number"])
def test_a_reload_refuses_it_and_the_old_model_goes_on(artefact, runtime, pixels, encode, name):
    config = ServeConfig((artefact,), runtime="onnxruntime")
    with TestClient(make_app(runtime, Limits(), access=Access(b"key"), load=lambda: load(config))) as client:
        before = client.get("/model", headers=KEY).json()
        entry, text, _ = DAMAGE[name]
        rewrite(artefact, entry, text)
        response = client.post("/admin/reload", headers=KEY)
        assert (response.status_code, response.json()["type"]) == (409, "urn:diracnet:problem:bad-model")
        assert client.get("/model", headers=KEY).json() == before
        assert client.post("/predict", content=encode(pixels[0]), headers=KEY).status_code == 200


def write_oversized(path):
    """Somebody else's net that asks for 4 TB: the mean of each channel, and as many ones as it takes."""
    value = helper.make_tensor_value_info
    shape = numpy_helper.from_array(np.array([2**40], np.int64), "shape")
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("ReduceMax", ["sizes"], ["largest"], keepdims=1),  # known only when it runs
        helper.make_node("Mul", ["largest", "shape"], ["many"]),
        helper.make_node("ConstantOfShape", ["many"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=1),
        helper.make_node("Add", ["mean", "sum"], ["scores"]),
    ]
    inputs = [value("x", TensorProto.FLOAT, ["N", 3, 8, 8])]
    graph = helper.make_graph(nodes, "large", inputs, [value("scores", TensorProto.FLOAT, ["N", 3])], [shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_a_graph_that_asks_for_too_much_memory_is_refused(tmp_path):
    path = tmp_path / "large.onnx"
    write_oversized(path)
    with pytest.raises(Refusal, match=r"^large\.onnx fails on images of noise: .*"):
        load(ServeConfig((path,), runtime="onnxruntime"))


@pytest.mark.parametrize(("text", "message"), [(DEEP, "nested deeper than 64"), ("[]", "is not a JSON object")])
def test_a_damaged_card_is_refused(tmp_path, text, message):
    engine = tmp_path / "plain.engine"
    engine.write_bytes(b"engine")
    (tmp_path / "plain.engine.json").write_text(text)
    with pytest.raises(Refusal, match=message):
        read_card(engine)
