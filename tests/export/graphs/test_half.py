"""A net that leaves float16's range is refused, although CPUs compute it in float32 and answer well."""

import json

import numpy as np
import onnx
import pytest

from common.cli import run_command
from export import parity, to_onnx
from export.eight_bits.calibrate import first_overflow
from export.graphs.graph import to_onnx as write_graph
from fold.graph import fold
from fold.image_sets import random_images
from fold.plain import save_plain


@pytest.fixture
def files(make_net, make_spec, tmp_path):
    """(plain.safetensors, half.onnx): the first convolution gives 2e4 times as much, the next two take it back."""
    fields = {"nonlinearity": "relu"}
    net, spec = fold(make_net(**fields)).float(), make_spec(**fields)
    for name, of_weight, of_bias in (
        ("stem.conv", 2e4, 2e4),
        ("group0.block0.conv", 1 / 250, 80),
        ("group0.block1.conv", 1 / 80, 1),
    ):
        tensors = net.graph[name].tensors
        tensors["weight"].mul_(of_weight)
        tensors["bias"].mul_(of_bias)
    plain, half = tmp_path / "plain.safetensors", tmp_path / "half.onnx"
    save_plain(plain, net, spec, {})
    half.write_bytes(write_graph(net, spec, {}, precision="fp16").SerializeToString())
    return plain, half


def test_the_export_refuses_it_and_names_the_node(files, tmp_path, capsys):
    plain, _ = files
    out = tmp_path / "out.onnx"
    argv = [str(plain), "--precision", "fp16", "--out", str(out)]
    assert run_command(to_onnx.command, to_onnx.ToOnnxConfig, argv=argv) == 2
    error = capsys.readouterr().err
    assert "overflows in float16: the output of stem.conv is beyond 65,504 on extreme images" in error
    assert not out.exists()


def test_parity_calls_it_different_where_the_answers_of_a_cpu_are_not(files, tmp_path):
    plain, half = files
    report = tmp_path / "report.json"
    argv = [str(half), "--against", str(plain), "--report", str(report)]
    assert run_command(parity.command, parity.ParityConfig, argv=argv) == 1
    rows = json.loads(report.read_text())["parity"]
    assert {(row["overflow"], row["within_tolerance"]) for row in rows} == {("stem.conv", False)}
    assert max(row["relative"] for row in rows) < 1e-2  # float16's tolerance: the difference alone would pass


def test_a_net_within_the_range_passes(make_net, make_spec):
    net, spec = fold(make_net()).float(), make_spec()
    assert first_overflow(write_graph(net, spec, {}, precision="fp16"), random_images(spec.image)) is None


def test_a_graph_of_a_fixed_batch_is_given_whole_batches_and_no_rest(files):
    model = onnx.load(files[1])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    mean, noise = (
        np.full((4, 8, 8, 3), 102, np.uint8),
        np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8),
    )
    assert first_overflow(model, np.concatenate([mean[:3], noise, mean[:1]])) == "stem.conv"
    assert first_overflow(model, np.concatenate([mean, noise])) is None


def test_real_images_are_looked_for_by_the_record_beside_the_plain_file(files, monkeypatch, capsys):
    """The split.json of a run whose folder has grown since."""
    asked = []

    def real_images(*_, **where):
        asked.append(where["beside"])
        return None, "there are none"

    monkeypatch.setattr("fold.image_sets.real_images", real_images)
    argv = [str(files[0]), "--precision", "fp16"]
    assert run_command(to_onnx.command, to_onnx.ToOnnxConfig, argv=argv) == 2  # it leaves float16's range
    assert asked == [files[0].parent]
