import json
from dataclasses import replace

import onnx
import pytest
import torch

from common.spec import Spec
from export.compare import compare
from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import OnnxSession, ort
from fold import nodes
from fold.graph import GraphNet, fold
from fold.nodes import Node


@pytest.mark.parametrize("nonlinearity", ["ncrelu", "relu"])
@pytest.mark.parametrize("channels", [1, 3])
def test_onnx_runtime_answers_as_the_dirac_net(write_onnx, images, nonlinearity, channels):
    net, path = write_onnx(depth=16, size=12, channels=channels, nonlinearity=nonlinearity)
    pixels = images(7, 12, channels)
    with torch.no_grad():
        expected = net(torch.from_numpy(pixels)).numpy()
    assert compare(("Dirac net", expected), ("ONNX Runtime", OnnxSession(path)(pixels)))


def test_the_contract_of_the_graph(write_onnx, make_spec):
    _, path = write_onnx(size=8)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 8, 8, 3])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["N", 10])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert Spec.from_json(metadata["spec"]) == make_spec(size=8)
    assert json.loads(metadata["provenance"]) == {"training": {"dataset": "none"}}


def test_nodes_are_named_like_the_layers_of_the_plain_net(write_onnx):
    net, path = write_onnx()
    names = {node.name for node in onnx.load(path).graph.node}
    layers = [node.name for node in fold(net).graph.nodes[1:]]
    assert set(layers) <= names
    assert "group0.block0.conv" in names


def test_batch_norm_and_dirac_parameters_are_gone(write_onnx):
    _, path = write_onnx()
    graph = onnx.load(path).graph
    assert {node.op_type for node in graph.node} == set(
        "Cast Transpose Sub Mul Conv Relu Min Concat MaxPool GlobalAveragePool Flatten Gemm".split()
    )


def test_an_operation_without_an_onnx_form_is_refused_by_name(make_net, make_spec, monkeypatch):
    monkeypatch.setitem(nodes.MAPS, "odd", lambda node, x: x)
    graph = fold(make_net()).graph
    odd = replace(graph, nodes=(*graph.nodes, Node("last", "odd", (graph.nodes[-1].name,))))
    with pytest.raises(TypeError, match="last: odd has no ONNX form here"):
        to_onnx(GraphNet(odd), make_spec(), {})
