"""Eight-bit graphs against an independent simulation of their arithmetic, and against float32."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from own_nets import moved
from scipy.stats import norm
from torch import nn
from torch.nn import functional

from common.refusal import Refusal
from export.artefacts import open_artefact
from export.eight_bits.calibrate import observe, ranges
from export.eight_bits.integer import eight_bit_part, quantize_filters, to_integer_onnx
from export.eight_bits.qdq import to_qdq_onnx
from export.eight_bits.quantize import answerer, measure_drop, quantize, relative_error, top1_agreement
from export.graphs.graph import to_onnx
from fold.graph import fold
from fold.lower import lower
from fold.lowerings import LOWERINGS
from fold.nodes import run
from train.layers import NCReLU, Normalize, Residual

INT8_LOWERINGS = ("concat", "shared", "shared-split", "skip")


@pytest.fixture
def calibrated(make_net, make_spec, images):
    """(plain net, spec, lowered net, float graph, ranges, pixels) of a row in a lowering."""

    def make(lowering, **fields):
        spec, pixels = make_spec(**fields), images(24, fields.get("size", 8))
        plain = fold(make_net(**fields)).float()
        lowered = lower(plain, lowering)
        floats = to_onnx(lowered, spec, {})
        return plain, spec, lowered, floats, ranges(observe(floats, pixels), "min-max"), pixels

    return make


def answers(model, pixels):
    return answerer(model)(pixels)


# Random nets are harder than trained ones: a tenth is what min-max ranges leave of the deepest here.
@pytest.mark.parametrize("lowering", INT8_LOWERINGS)
def test_integers_answer_nearly_as_float32(calibrated, row, lowering):
    plain, spec, lowered, _, reach, pixels = calibrated(lowering, **row)
    expected = answers(to_onnx(plain, spec, {}), pixels)
    assert relative_error(expected, answers(to_integer_onnx(lowered, spec, {}, reach), pixels)) < 0.25


@pytest.mark.parametrize("lowering", ["concat", "skip"])
def test_no_convolution_or_sum_is_written_with_a_range_that_nobody_measured(calibrated, lowering):
    _, spec, lowered, _, reach, _ = calibrated(lowering, depth=10)
    with pytest.raises(KeyError, match=r"group1\.block0"):
        to_integer_onnx(lowered, spec, {}, {name: ends for name, ends in reach.items() if "group1.block0" not in name})


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_qdq_answers_nearly_as_float32(calibrated, lowering, precision):
    plain, spec, _, floats, reach, pixels = calibrated(lowering)
    model = to_qdq_onnx(floats, reach, precision=precision)
    assert relative_error(answers(to_onnx(plain, spec, {}), pixels), answers(model, pixels)) < 0.15


def test_integer_arithmetic_is_what_it_says(calibrated):
    """A second writing of the graph in torch: floats that hold the same integers."""
    _, spec, lowered, _, reach, pixels = calibrated("concat", depth=10)

    def eight_bits(x, name):
        low, high = min(reach[name][0], 0), max(reach[name][1], 0)
        scale = np.float32((high - low) / 255)
        zero = np.rint(-low / scale)
        return ((x / scale + zero).round().clamp(0, 255) - zero) * scale

    x = torch.from_numpy(pixels)
    for node in lowered.graph.nodes[1:]:
        if node.op == "conv" and node.name != "stem.conv":
            weight, scales = quantize_filters(node.tensors["weight"].numpy())
            filters = torch.from_numpy(weight * scales.reshape(-1, 1, 1, 1))
            x = functional.conv2d(x, filters, node.tensors["bias"], padding=1)
            x = eight_bits(x, node.name)
        else:
            x = run(node, [x])
        if node.name == "stem.relu":
            x = eight_bits(x, node.name)
    found = answers(to_integer_onnx(lowered, spec, {}, reach), pixels)
    # Levels that lie within float32's rounding of a half may go either way.
    assert relative_error(x.numpy(), found) < 0.01


def test_integers_are_all_there_is_between_stem_and_pool(calibrated):
    _, spec, lowered, _, reach, _ = calibrated("skip", depth=16)
    model = to_integer_onnx(lowered, spec, {}, reach)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 1
    assert kinds.count("QLinearConv") == 12
    between = set(kinds[kinds.index("QuantizeLinear") + 1 : kinds.index("DequantizeLinear")])
    assert between <= {"QLinearConv", "QLinearAdd", "Max", "Min", "Concat", "NhwcMaxPool"}


def test_tensorrt_gets_signed_symmetric_eight_bits_and_float_biases(calibrated):
    *_, floats, reach, _ = calibrated("skip", depth=16)
    model = to_qdq_onnx(floats, reach, precision="int8")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in pairs:
        zero = stored[node.input[2]]
        assert zero.data_type == onnx.TensorProto.INT8
        assert not numpy_helper.to_array(zero).any()
    for node in model.graph.node:
        if node.op_type == "Conv" and node.name != "stem.conv":
            assert node.input[0].endswith(".dq")
            assert node.input[1].endswith(".weight.dq")
            assert stored[node.input[2]].data_type == onnx.TensorProto.FLOAT
    assert floats.graph.node[0].op_type == "Cast"
    assert not [node for node in floats.graph.node if "Linear" in node.op_type]  # the argument is as it was


def test_a_filter_of_zeros_and_the_largest_weight_survive():
    weight = np.zeros((2, 3, 3, 3), np.float32)
    weight[1, 0, 1, 1], weight[1, 1, 1, 1] = -2.54, 1.0
    levels, scales = quantize_filters(weight)
    assert levels[1, :2, 1, 1].tolist() == [-127, 50]
    assert scales.tolist() == pytest.approx([1.0, 0.02])
    assert not levels[0].any()


@pytest.mark.parametrize("faded", [1e-15, 1e-43, 0.0])
@pytest.mark.parametrize("form", ["integers", "for ONNX Runtime", "for TensorRT"])
def test_a_channel_that_training_has_faded_out_keeps_its_bias(make_net, make_spec, images, form, faded):
    """Weight decay shrinks a filter and its γ without end; β stays. The bias is then beyond 32 bits of products."""
    net, spec, pixels = make_net(depth=10), make_spec(depth=10), images(24)
    norm = net.get_submodule("group1.block0.bn")
    with torch.no_grad():
        norm.weight[::2] *= faded
        norm.bias[::2] += 5.0
    plain = fold(net).float()
    floats = to_onnx(plain, spec, {})
    reach = ranges(observe(floats, pixels), "min-max")
    if form == "integers":
        model = to_integer_onnx(plain, spec, {}, reach)
    else:
        model = to_qdq_onnx(floats, reach, precision="int8", for_onnxruntime=form == "for ONNX Runtime")
    assert relative_error(answers(floats, pixels), answers(model, pixels)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_delta_outside_the_filters_wins_where_it_dominates(make_net, make_spec, images, target):
    """What eight bits lose with δ in the filters is lost by the filters: their other weights round away."""
    net = make_net(depth=16)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith(".a"):
                tensor.fill_(5)
            if name.endswith("bn.weight"):
                tensor.abs_().add_(0.2)
            if name.endswith(".b"):
                tensor.mul_(0.5)
    pixels = images(96)
    model, candidates = quantize(
        fold(net).float(),
        make_spec(depth=16),
        precision="int8",
        target=target,
        lowerings=("concat", "skip"),
        observed=pixels[:48],
        chosen_by=pixels[48:],
    )
    assert candidates[0].lowering == "skip"
    assert len(candidates) == 6
    errors = [candidate.relative_error for candidate in candidates]
    assert errors == sorted(errors)
    best = min(row.relative_error for row in candidates if row.lowering == "concat")
    assert errors[0] < 0.6 * best
    expected = answers(to_onnx(fold(net), make_spec(depth=16), {}), pixels[48:])
    assert relative_error(expected, answers(model, pixels[48:])) == pytest.approx(errors[0])


@pytest.mark.parametrize("lowering", [lowering for lowering in LOWERINGS if lowering not in INT8_LOWERINGS])
def test_a_lowering_without_an_eight_bit_form_is_refused(calibrated, lowering):
    _, spec, lowered, _, reach, _ = calibrated(lowering)
    with pytest.raises(Refusal, match=r": \w+ has no eight-bit form; export int8 as concat, shared or skip"):
        to_integer_onnx(lowered, spec, {}, reach)


def test_a_drop_counts_what_is_lost():
    reference = np.eye(4)[[0, 1, 2, 3]] * 3.0
    logits = reference.copy()
    logits[3] = [9, 0, 0, 0]
    drop = measure_drop(reference, logits, np.arange(4))
    assert (drop.float32_accuracy, drop.accuracy, drop.top1_agreement, drop.num_images) == (1, 0.75, 0.75, 4)
    assert not drop
    assert measure_drop(reference, reference + 7.0, np.arange(4))  # what all classes share changes nothing
    assert relative_error(reference, reference + 7.0) == pytest.approx(0, abs=1e-12)
    equal = np.ones((2, 3), np.float32)  # of a classifier of zeros
    assert (relative_error(equal, 2 * equal), relative_error(equal, reference[:2, :3])) == (0.0, np.inf)
    assert top1_agreement(reference, -reference) == 0


def test_the_ends_of_a_loss_hold_together_with_95_percent():
    """Of 400 images 12 turn wrong and none right: Wilson's ends of two intervals of 97.5 %, from their equation."""
    reference = np.tile([1.0, 0.0], (400, 1))
    logits = reference.copy()
    logits[:12] = [0.0, 1.0]
    drop = measure_drop(reference, logits, np.zeros(400, int))
    z = norm.ppf(1 - 0.025 / 2)
    of_none = z**2 / (400 + z**2)  # the upper end for no image
    for share in (drop.lost_high, drop.lost_low + of_none):
        assert (share - 0.03) ** 2 == pytest.approx(z**2 * share * (1 - share) / 400, rel=1e-5)
    assert drop.lost_low + of_none < 0.03 < drop.lost_high
    back = measure_drop(logits, reference, np.zeros(400, int))
    assert (back.lost_low, back.lost_high) == pytest.approx((-drop.lost_high, -drop.lost_low))


def test_an_fp8_file_is_compared_with_the_optimiser_off(calibrated, tmp_path):
    """With it ONNX Runtime 1.31 answers such graphs wrongly."""
    plain, spec, _, floats, reach, pixels = calibrated("split")
    path = tmp_path / "fp8.onnx"
    path.write_bytes(to_qdq_onnx(floats, reach, precision="fp8").SerializeToString())
    form = open_artefact(path)
    expected = answers(to_onnx(plain, spec, {}), pixels)
    assert form.precision == "fp8"
    assert relative_error(expected, form.answer(pixels)) < 0.15
    assert relative_error(expected, form.layers(pixels)["fc"]) < 0.15


def test_windows_of_any_shape_have_integer_nodes(make_spec, images):
    """A pool that rounds up and is not square, and a kernel with more zeros on one side."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 2, padding="same"), nn.MaxPool2d((2, 3), 2, ceil_mode=True)
    head = nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    spec, pixels = make_spec(size=11), images(48, 11)
    plain = fold(nn.Sequential(Normalize(spec.image.mean, spec.image.std), *layers, *head)).float()
    how = {"precision": "int8", "target": "onnxruntime", "lowerings": ["concat"]}
    model, candidates = quantize(plain, spec, **how, observed=pixels[:24], chosen_by=pixels[24:])
    assert {"QLinearConv", "NhwcMaxPool"} <= {node.op_type for node in model.graph.node}
    assert candidates[0].relative_error < 0.15


def conv(num_in, num_out):
    return nn.Conv2d(num_in, num_out, 3, padding=1)


def pool():
    return nn.AdaptiveAvgPool2d(1)


def branch(*layers):
    return Residual(nn.Sequential(*layers), nn.Sequential())


def quantized(make_spec, pixels, layers, lowering):
    """The integer graph of a net whose ends are these layers' and a matrix of 8 channels, and how far it is off."""
    spec = make_spec()
    net = nn.Sequential(Normalize(spec.image.mean, spec.image.std), *layers, nn.Flatten(), nn.Linear(8, 10))
    plain = fold(moved(net))
    how = {"precision": "int8", "target": "onnxruntime", "lowerings": [lowering]}
    model, candidates = quantize(plain.float(), spec, **how, observed=pixels[:24], chosen_by=pixels[24:])
    return plain, model, candidates[0].relative_error


STEMS = {
    "an NCReLU before the first convolution": (NCReLU(), conv(6, 8)),
    "a branch at once": (branch(conv(3, 3), nn.ReLU(), conv(3, 3)), conv(3, 8)),
    "a pool in a branch": (Residual(nn.Sequential(conv(3, 8)), nn.Sequential(conv(3, 8), nn.MaxPool2d(3, 1, 1))),),
}


@pytest.mark.parametrize("lowering", ["concat", "shared-split", "split", "skip"])
@pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS)
def test_a_stem_of_several_convolutions_stays_in_float32(make_spec, images, stem, lowering):
    layers = *stem, nn.ReLU(), conv(8, 8), pool()
    _, model, error = quantized(make_spec, images(48), layers, lowering)
    kinds = [node.op_type for node in model.graph.node]
    assert "QLinearConv" in kinds[kinds.index("QuantizeLinear") :]
    assert error < 0.15


POOLS = {
    "after one of two branches": (conv(3, 8), nn.ReLU(), branch(conv(8, 8), pool())),
    "in both": (conv(3, 8), nn.ReLU(), Residual(*(nn.Sequential(conv(8, 8), pool()) for _ in range(2)))),
}


@pytest.mark.parametrize("layers", POOLS.values(), ids=POOLS)
def test_a_pool_in_a_branch_leaves_its_net_to_qdq(make_spec, images, layers):
    layers = *layers, pool()
    plain, model, error = quantized(make_spec, images(48), layers, "concat")
    assert not eight_bit_part(plain.graph)
    assert "DequantizeLinear" in {node.op_type for node in model.graph.node}
    assert error < 0.15


@pytest.mark.parametrize(
    "layers", [(conv(3, 8), pool()), (pool(), nn.Conv2d(3, 8, 1))], ids=["with one convolution", "pooled at once"]
)
def test_a_net_whose_only_convolution_is_its_stem_has_no_eight_bit_form(make_spec, images, layers):
    with pytest.raises(Refusal, match="the net has no convolution but its first"):
        quantized(make_spec, images(48), layers, "concat")


def test_a_net_without_a_convolution_has_no_eight_bit_form(make_spec, images):
    spec = make_spec()
    layers = Normalize(spec.image.mean, spec.image.std), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)
    how = {"precision": "int8", "target": "onnxruntime", "lowerings": ["concat"]}
    with pytest.raises(Refusal, match="the net has no convolution but its first"):
        quantize(fold(nn.Sequential(*layers)).float(), spec, **how, observed=images(4), chosen_by=images(4))
