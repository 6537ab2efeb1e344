"""Rounding in training is the rounding of the exported int8 file."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from export.eight_bits.calibrate import observe, ranges
from export.eight_bits.integer import levels_of, quantize_filters, to_integer_onnx
from export.graphs.graph import to_onnx
from fold.graph import fold
from train.fine_tune import fake_quantize
from train.fine_tune.fake_quantize import FakeQuantized, round_activations, round_filters

ROWS = {
    "ncrelu": {},
    "relu": {"nonlinearity": "relu"},
    "pooled": {"family": "pooled", "size": 13},
    "per-output-b": {"parameterization": "per-output-b"},
    "plain": {"parameterization": "plain"},
    "imagenet-18": {"family": "imagenet", "depth": 18, "width": 1 / 16, "size": 32},
}


def test_filters_are_those_that_the_export_writes():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(7, 4, 3, 3)).astype(np.float32)
    weight[0] = 0
    weight[1, 0, 1, 1] = 40
    weight[2] = 1 + 0.1 * np.abs(weight[2])  # of one sign and nearly equal: a pair is twice the largest
    levels, scales = quantize_filters(weight)
    expected = levels * scales.reshape(-1, 1, 1, 1)
    found = round_filters(torch.from_numpy(weight)).numpy()
    # The export divides in float64: a weight half-way between two levels may fall on the other side.
    off = np.abs(found - expected) > 1e-6 * np.abs(weight).max()
    assert off.mean() < 0.01
    assert np.abs(found - expected).max() <= 1.001 * scales.max()


@pytest.mark.parametrize("reach", [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)])
def test_activations_take_the_levels_that_the_export_gives_to_their_range(reach):
    x = torch.linspace(*reach, 1001)
    scale, zero = levels_of(reach)
    expected = (np.clip(np.rint(x.numpy() / scale) + zero, 0, 255) - zero) * scale
    found = round_activations(x).numpy()
    assert np.abs(found - expected).max() <= (1.001 * scale if reach[0] != reach[1] else 0)
    assert (np.abs(found - expected) > 1e-3 * scale).mean() < 0.01
    assert round_activations(torch.tensor([0.0, *reach]))[0] == 0


def test_what_a_relu_removes_takes_no_levels():
    x = torch.tensor([-100.0, 0.1, 1.0])
    assert torch.allclose(round_activations(x, rectified=True), torch.tensor([0.0, 0.1, 1.0]), atol=0.003)


@pytest.mark.parametrize("fields", ROWS.values(), ids=ROWS)
def test_every_layer_rounds_as_that_of_the_int8_file(fields, make_net, make_spec, images, monkeypatch):
    """Each given what the file's layer before gives, and its range: equal levels but for ties, and equal logits."""
    net, spec, pixels = make_net(**fields), make_spec(**fields), images(24, fields.get("size", 8))
    plain = fold(net).float()
    reach = ranges(observe(to_onnx(plain, spec, {}), pixels), "min-max")
    model = to_integer_onnx(plain, spec, {}, reach)
    exported, logits = outputs(model, pixels)
    layers = iter(exported)

    def round_as_exported(x, *, rectified=False):
        name, scale, expected = next(layers)
        low, high = map(torch.tensor, reach[name])
        rounded = fake_quantize.round_between(low * (not rectified), high, x).numpy()
        # The file rounds its biases to units of the products, which moves what is nearly half-way between two levels.
        clipped = x.clamp(float(expected.min()), float(expected.max())).numpy()
        assert np.abs(clipped - expected).max() < 0.55 * scale, name
        assert (np.abs(rounded - expected) > 0.01 * scale).mean() < 0.03, name
        return torch.from_numpy(expected)

    monkeypatch.setattr(fake_quantize, "round_activations", round_as_exported)
    with torch.no_grad():
        found = FakeQuantized(net)(torch.from_numpy(pixels)).numpy()
    assert next(layers, None) is None
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def outputs(model, pixels):
    """([(layer, scale, what it gives as floats [N, C, H, W])], logits) of an integer graph."""
    nodes = [node.output[0] for node in model.graph.node if node.op_type in ("QuantizeLinear", "QLinearConv")]
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in nodes)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    logits, *values = session.run(["logits", *nodes], {"images": pixels})
    layers = []
    for node, value in zip(nodes, values, strict=True):
        name = node.removesuffix(".quantized")
        scale, zero = constants[f"{name}.scale"], constants[f"{name}.zero"]
        layers.append((name, scale, np.moveaxis(scale * (value.astype(np.float32) - zero), -1, 1)))
    return layers, logits


@pytest.mark.parametrize("fields", ROWS.values(), ids=ROWS)
def test_gradients_reach_every_parameter_of_the_net(fields, make_net, images):
    net = make_net(**fields)
    rounded = FakeQuantized(net).train()
    assert {name.removeprefix("net.") for name in rounded.state_dict()} == net.state_dict().keys()
    logits = rounded(torch.from_numpy(images(6, fields.get("size", 8))))
    torch.nn.functional.cross_entropy(logits, torch.arange(6)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_layers_are_rounded_at_the_same_places_once_processes_share_their_statistics(make_net, images):
    """After --freeze a net whose layers have become SyncBatchNorm is wrapped once more."""
    net, x = make_net(), torch.from_numpy(images(4))
    expected = FakeQuantized(net).eval()(x)
    assert torch.equal(FakeQuantized(nn.SyncBatchNorm.convert_sync_batchnorm(net)).eval()(x), expected)


def test_levels_of_a_filter_do_not_depend_on_what_batch_normalisation_scales_it_by():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, generator=generator)
    scale = torch.tensor([0.01, -1.0, 3.0, -40.0, 0.5]).view(-1, 1, 1, 1)
    expected = scale * round_filters(weight)
    # A weight half-way between two levels may fall on the other side.
    assert ((round_filters(scale * weight) - expected).abs() > 1e-5 * scale.abs()).float().mean() < 0.01
