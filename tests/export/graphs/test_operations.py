"""Each operation of a graph in ONNX: what ONNX Runtime answers, and the file's net in PyTorch, is what the net does."""

from pathlib import Path

import numpy as np
import onnx
import own_nets
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.refusal import Refusal
from export.eight_bits.quantize import answerer
from export.graphs.graph import to_onnx
from export.runtimes.torch_graphs import read_net
from fold.graph import GraphNet, fold
from fold.lower import GRAPH_LOWERINGS, lower
from fold.nodes import OPERATIONS
from fold.shapes import pooled
from fold.sources import from_made
from fold.user_net import Made
from train.layers import DiracConv2d, NCReLU

# Roundings of 2^-24 in a net of a dozen layers; of 2^-11 where weights and what lies between nodes are float16.
TOLERANCES = {"fp32": 1e-5, "fp16": 5e-3}


SIZE = (15, 12)


def source(net):
    """The plain form of a net, as fold/run.py has it."""
    return from_made(Made(own_nets.moved(net), "net", {}, SIZE, (0.4,) * 3, (0.3,) * 3))


def pixels(num=3):
    return torch.randint(256, (num, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def error(made, model):
    """By the net's own code, in float64; the larger one of ONNX Runtime and of PyTorch."""
    with torch.no_grad():
        expected = made.net.double()(pixels()).numpy()
    made.net.float()
    again = read_net(Path("plain.onnx"), model.SerializeToString())
    answers = (answerer(model)(pixels().numpy()), again(pixels()).numpy())
    return max(np.abs(answer - expected).max() for answer in answers) / np.abs(expected).max()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("make", [own_nets.this_morning, own_nets.everything, own_nets.chain])
def test_a_graph_is_answered_as_the_net(make, precision):
    made = source(make())
    assert error(made, to_onnx(made.plain, made.spec, {}, precision=precision)) <= TOLERANCES[precision]


def test_every_operation_that_is_listed_has_been_written():
    """Those of images are in the nets of tests/own_nets.py and below; none is forgotten when one is added."""
    nets = (own_nets.this_morning(), own_nets.everything(), Dirac(), Rows())
    written = {node.op for net in nets for node in source(net).plain.graph.nodes}
    assert written == set(OPERATIONS)


class Dirac(nn.Module):
    """An NCReLU that two convolutions read, one of them with a stride, and one that a concatenation reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.ncrelu = nn.Conv2d(3, 4, 3), NCReLU(dims=2)
        self.left, self.right = DiracConv2d(8, 4, 3, padding=1), DiracConv2d(8, 4, 3, padding=1)
        self.end, self.head = nn.Conv2d(16, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        y = self.ncrelu(self.stem(x))
        z = torch.cat([F.relu(self.left(y)), self.right(y).tanh()], 1)
        return self.head(self.end(self.ncrelu(F.max_pool2d(torch.cat([z, z], 1)[:, :8], 2))).relu().mean((2, 3)))


class Rows(nn.Module):
    """A matrix along the last axis of an image, then one of channels."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Linear(12, 7), nn.Linear(3, 5)

    def forward(self, x):
        return self.head(F.relu(self.rows(x)).mean((2, 3)))


class LastChannels(nn.Module):
    """Channels counted from the last one."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(11, 5)

    def forward(self, x):
        y = self.stem(x)
        return self.head(torch.cat([y[:, -4:], y[:, :-2], y[:, -5:-2]], 1).relu().mean((2, 3)))


def test_channels_may_be_counted_from_the_last():
    made = source(LastChannels())
    assert error(made, to_onnx(made.plain, made.spec, {})) <= TOLERANCES["fp32"]


def test_a_matrix_may_stand_before_the_last_pool():
    made = source(Rows())
    assert error(made, to_onnx(made.plain, made.spec, {})) <= TOLERANCES["fp32"]


@pytest.mark.parametrize("lowering", GRAPH_LOWERINGS)
def test_lowerings_of_a_graph_keep_its_outputs_and_names(lowering):
    made = source(Dirac())
    lowered = lower(made.plain, lowering)
    with torch.no_grad():
        expected = made.plain(pixels())
        assert (lowered.double()(pixels()) - expected).abs().max() < 1e-12 * expected.abs().max()
    outputs, before = dict(lowered.values(pixels())), dict(made.plain.values(pixels()))
    for name in ("stem", "left", "right", "end", "head"):
        assert torch.allclose(outputs[name], before[name], rtol=0, atol=1e-12)
    ops = [node.op for node in lowered.graph.nodes]
    # The second NCReLU's reader is a convolution too; what is left of either is said by the form.
    assert ops.count("ncrelu") == (2 if lowering == "concat" else 0)
    assert ops.count("conv") == (7 if lowering in ("shared-split", "split") else 4)
    assert error(made, to_onnx(lower(made.plain, lowering), made.spec, {})) <= TOLERANCES["fp32"]


def test_an_ncrelu_that_others_read_stays():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), NCReLU(dims=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    made = source(net)
    assert [node.op for node in lower(made.plain, "split").graph.nodes] == [node.op for node in made.plain.graph.nodes]


def test_names_between_nodes_give_way_to_those_of_the_net():
    """A gate whose own parts are called as those that the writer would call its own."""

    class Taken(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.SiLU()
            self.conv = nn.Conv2d(3, 4, 1)
            self.images = nn.Conv2d(4, 5, 1)
            self.act.gate = nn.Identity()

        def forward(self, x):
            return self.images(F.gelu(self.act(self.conv(x)))).mean((2, 3))

    made = source(Taken())
    names = [node.name for node in made.plain.graph.nodes]
    assert "images_" in names
    graph = made.plain.graph
    renamed = {"gelu": "act.gate"}
    nodes = tuple(
        type(node)(
            renamed.get(node.name, node.name),
            node.op,
            tuple(renamed.get(name, name) for name in node.inputs),
            node.attributes,
            node.tensors,
        )
        for node in graph.nodes
    )
    model = to_onnx(GraphNet(type(graph)(nodes)), made.spec, {})
    assert {"act.gate", "act.gate_"} <= {node.name for node in model.graph.node}
    assert error(made, model) <= TOLERANCES["fp32"]


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 3, 0), (2, 3, 1), (5, 4, 2)])
@pytest.mark.parametrize("counts", [None, False, True])
def test_pools_that_round_up_are_padded_or_refused(window, counts):
    size, stride, padding = window
    pool = (
        nn.MaxPool2d(size, stride, padding, ceil_mode=True)
        if counts is None
        else nn.AvgPool2d(size, stride, padding, ceil_mode=True, count_include_pad=counts)
    )
    made = source(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), pool, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    num, rounded_up = ([pooled(edge, *window, 1, ceil=ceil) for edge in SIZE] for ceil in (False, True))
    if counts and padding and num != rounded_up:
        with pytest.raises(Refusal, match="2: ONNX has no average pool that rounds its size up and counts its padding"):
            to_onnx(made.plain, made.spec, {})
    else:
        assert error(made, to_onnx(made.plain, made.spec, {})) <= TOLERANCES["fp32"]


def test_nodes_are_named_like_the_users_modules():
    made = source(own_nets.this_morning())
    model = to_onnx(made.plain, made.spec, {})
    assert {"stem.large.0", "body.2.wide", "body.3.excite", "pool", "logits_"} <= {n.name for n in model.graph.node}
    assert model.graph.output[0].name == "logits"
    onnx.checker.check_model(model, full_check=True)


def test_a_net_of_signals_is_not_one_of_images():
    plain = fold(nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval(), torch.rand(2, 2, 9))
    with pytest.raises(Refusal, match="0: conv of"):
        to_onnx(plain, source(own_nets.chain()).spec, {})
