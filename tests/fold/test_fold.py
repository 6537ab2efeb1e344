import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from common.refusal import Refusal
from fold.graph import fold
from fold.lower import split_ncrelu
from fold.operations import fold_batch_norm
from fold.plain import load_plain, save_plain, skeleton
from fold.proof import prove
from train.checkpoint import PLAIN_FORMAT
from train.layers import DiracConv1d, DiracConv2d, DiracConv3d, NCReLU, dirac_delta, dirac_weight

LAYERS = {1: (DiracConv1d, nn.BatchNorm1d), 2: (DiracConv2d, nn.BatchNorm2d), 3: (DiracConv3d, nn.BatchNorm3d)}


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.floats(-5, 5), st.floats(-3, 3), st.integers(0, 99))
def test_dirac_and_batch_norm_fold_exactly_in_one_to_three_dimensions(dims, m, square, a, b, seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(square, square * m, *[3] * dims))
    gamma, beta, mean, var = (*rng.normal(size=(3, square)), rng.uniform(0.1, 2, square))
    x = rng.normal(size=(2, square * m, *[5] * dims))
    convolved = reference.convolve(x, reference.folded_weight(a, b, weight), 1)
    expected = reference.batch_norm(convolved, gamma, beta, mean, var, 1e-5)

    delta = dirac_delta(weight.shape).double()
    folded = dirac_weight(
        torch.tensor(a, dtype=delta.dtype), torch.tensor(b, dtype=delta.dtype), delta, torch.from_numpy(weight)
    )
    statistics = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
    scale, bias = fold_batch_norm(**{key: torch.from_numpy(value) for key, value in statistics.items()}, epsilon=1e-5)
    folded = scale.view(-1, *[1] * (dims + 1)) * folded
    actual = reference.convolve(x, folded.numpy(), 1) + bias.numpy().reshape(1, -1, *[1] * dims)
    # eps(float64) x terms per output x size of the values, with room to spare.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))


def test_fold_batch_norm_keeps_a_convolutions_bias():
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double().eval()
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias), nn.init.normal_(bn.running_mean)
    x = torch.randn(2, 3, 6, 6).double()
    plain = fold(nn.Sequential(conv, bn))
    assert torch.allclose(plain(x), bn(conv(x)), rtol=0, atol=1e-13)


def test_every_family_folds_to_1e_12(make_net, images, row):
    net = make_net(**row)
    x = torch.from_numpy(images(4, row.get("size", 8)))
    plain = fold(net)
    with torch.no_grad():
        expected = net.double()(x)
        error = ((plain(x) - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-12, f"the fold is off by {error:.1e} of the output: fold/operations.py or fold/rules.py"


def test_a_plain_net_holds_nothing_but_convolutions_activations_and_pools(make_net):
    kinds = {node.op for node in fold(make_net()).graph.nodes[1:]}
    assert kinds == {"normalize", "conv", "relu", "ncrelu", "max_pool", "global_pool", "flatten", "linear"}


def test_the_half_that_reads_only_zeros_is_dropped(make_net):
    plain = fold(make_net()).graph
    assert "group0.block0.ncrelu" not in [node.name for node in plain.nodes]
    assert plain["group0.block0.conv"].tensors["weight"].shape[1] == 4
    assert plain["group0.block1.conv"].tensors["weight"].shape[1] == 8


def test_fold_leaves_its_argument_alone(make_net):
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    text = str(net)
    fold(net)
    assert str(net) == text
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("bias", [False, True])
def test_torchs_own_fusion_refuses_a_dirac_layer_and_ours_folds_it(bias):
    """It would scale W, which eq. 5 then normalises again: silently another net."""
    torch.manual_seed(0)
    conv, bn = DiracConv2d(6, 3, 3, padding=1, bias=bias).double(), nn.BatchNorm2d(3).double().eval()
    nn.init.normal_(bn.weight), nn.init.normal_(bn.running_mean), nn.init.uniform_(bn.running_var, 0.5, 2)
    with pytest.raises(Refusal, match="the weight of a Dirac convolution is not replaced"):
        nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), bn)
    x = torch.randn(2, 6, 4, 4).double()
    with torch.no_grad():
        expected = bn(conv(x))
        assert (fold(nn.Sequential(conv, bn))(x) - expected).abs().max() < 1e-13 * expected.abs().max()


def test_batch_norm_without_a_convolution_before_it_becomes_one(images):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(3).double().eval()
    nn.init.normal_(bn.weight), nn.init.normal_(bn.running_mean)
    x = torch.randn(2, 3, 5, 5).double()
    plain = fold(nn.Sequential(nn.ReLU(), bn, nn.ReLU()))
    assert torch.allclose(plain(x), bn(x.relu()).relu(), rtol=0, atol=1e-14)


def test_split_ncrelu_is_equation_10():
    torch.manual_seed(0)
    weight, x = torch.randn(4, 6, 3, 3).double(), torch.randn(2, 3, 5, 5).double()
    w1, w2 = split_ncrelu(weight)
    whole = nn.functional.conv2d(NCReLU()(x), weight)
    halves = nn.functional.conv2d(x.relu(), w1) - nn.functional.conv2d((-x).relu(), w2)
    assert torch.allclose(whole, halves, rtol=0, atol=1e-13)


def test_every_unknown_layer_is_named_in_one_error():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softsign(), nn.Sequential(nn.Upsample(scale_factor=2)))
    with pytest.raises(TypeError, match=r"cannot be folded: 1 \(Softsign\), 2\.0 \(Upsample\)"):
        fold(net)


def test_the_proof_is_true_for_the_fold_and_false_for_a_changed_weight(make_net, images):
    net = make_net()
    plain = fold(net)
    sets = {"random": torch.from_numpy(images())}
    assert prove(net, plain, sets)
    plain.graph["group1.block1.conv"].tensors["weight"].mul_(1 + 1e-6)
    proof = prove(net, plain, sets)
    assert not proof
    assert "float64 logits on random images differ" in proof.failures()[0]
    first_bad = next(row.what for row in proof.layers if row.relative > 1e-9)
    assert first_bad == "group1.block1.conv"


def test_the_proof_is_false_for_nan(make_net, images):
    net = make_net()
    plain = fold(net)
    plain.graph["fc"].tensors["bias"][0] = float("nan")
    assert not prove(net, plain, {"random": torch.from_numpy(images())})


def test_plain_file_round_trip_keeps_weights_spec_and_provenance(make_net, make_spec, images, tmp_path):
    net = fold(make_net()).float()
    path = tmp_path / "plain.safetensors"
    save_plain(path, net, make_spec(), {"training": {"seed": 3}})
    plain = load_plain(path)
    assert plain.spec == make_spec()
    assert plain.provenance == {"training": {"seed": 3}}
    with safe_open(path, "pt") as file:
        assert all(name.endswith((".weight", ".bias")) for name in list(file.keys()))
    x = torch.from_numpy(images())
    assert torch.equal(plain.net(x), net(x))


def test_plain_files_that_are_damaged_are_refused(make_net, make_spec, tmp_path):
    path = tmp_path / "plain.safetensors"
    net = fold(make_net()).float()
    save_plain(path, net, make_spec(), {})
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[:-9], b"hello" * 99):
        path.write_bytes(damaged)
        with pytest.raises(Refusal, match="not a valid safetensors file"):
            load_plain(path)
    save_plain(path, net, make_spec(depth=16), {})
    with pytest.raises(Refusal, match=r"does not fit its spec .*: group0\.block2\.conv\.weight is missing, .* more"):
        load_plain(path)
    save_plain(path, net, make_spec(num_labels=4), {})
    wrong = r"fc\.weight is \[10, 16\], must be \[4, 16\], fc\.bias is \[10\], must be \[4\]"
    with pytest.raises(Refusal, match=rf"does not fit its spec .*: {wrong}"):
        load_plain(path)
    save_plain(path, fold(make_net(depth=16)).float(), make_spec(), {})
    with pytest.raises(Refusal, match=r"group0\.block2\.conv\.bias is not part of it, .* more"):
        load_plain(path)
    save_plain(path, net, make_spec(), {})
    tensors = {**load_file(path), "a\nb": torch.zeros(1)}
    path.write_bytes(save(tensors, {"format": PLAIN_FORMAT, "spec": make_spec().to_json()}))
    with pytest.raises(Refusal, match=r": a b is not part of it$"):
        load_plain(path)
    net.graph["fc"].tensors["bias"][0] = float("inf")
    save_plain(path, net, make_spec(), {})
    with pytest.raises(Refusal, match=r"NaN or infinite values in fc\.bias"):
        load_plain(path)
    with pytest.raises(Refusal, match="cannot read"):
        load_plain(tmp_path / "none.safetensors")


def test_the_skeleton_has_the_shapes_of_a_folded_net(make_net, make_spec, row):
    shapes = {name: tensor.shape for name, tensor in fold(make_net(**row)).graph.tensors().items()}
    assert {name: tensor.shape for name, tensor in skeleton(make_spec(**row)).tensors().items()} == shapes
