"""Any net: right, or refused by name. Every net's numbers lie away from their initial values."""

import json
from copy import deepcopy

import pytest
import torch
from small_nets import TOLERANCE, Lambda, Sum, conv, error, moved, noise
from torch import nn
from torch.nn import functional as F

from common.refusal import Refusal
from fold.graph import GraphNet, fold
from fold.nodes import Graph
from train.layers import DiracConv1d, DiracConv2d, DiracConv3d, NCReLU, ncrelu


class PlusBody(nn.Module):
    """x + f(x), with the parts registered in another order than that in which they run."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        return x + self.bn(self.conv(self.act(x)))


class DoubledDirac(DiracConv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(x).relu())


class LeakyAsRelu(nn.ReLU):
    def forward(self, input):
        return F.leaky_relu(input, 0.3)


class AddedInPlace(nn.Module):
    """x += y and the like: of a value that nothing else reads, and, if `late`, of one that is read again."""

    def __init__(self, *, late=False):
        super().__init__()
        self.conv, self.late = nn.Conv2d(4, 4, 1), late

    def forward(self, x):
        y = self.conv(x)
        z = y
        z += x.relu()
        z *= 2
        z -= x
        z /= 4
        return z + y if self.late else z


class Overwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        z = F.relu(y, inplace=True)
        return z * 2 + y


X = (2, 4, 7, 6)
RIGHT = {
    "x + f(x) in a forward": (PlusBody(), X),
    "a subclass of DiracConv2d": (nn.Sequential(DoubledDirac(4, 4, 3, padding=1), nn.BatchNorm2d(4)), X),
    "one module used twice": (Twice(), X),
    "ReLU, NCReLU, grouped convolution": (nn.Sequential(nn.ReLU(), NCReLU(), nn.Conv2d(8, 4, 3, groups=2)), X),
    "x += y": (AddedInPlace(), X),
    "an activation subclass": (nn.Sequential(conv(), LeakyAsRelu()), X),
    "ReLU, nested NCReLU, Dirac": (nn.Sequential(nn.ReLU(), nn.Sequential(NCReLU()), DiracConv2d(8, 4, 3)), X),
    "NCReLU of a pool of ReLU": (nn.Sequential(nn.ReLU(), NCReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)), X),
    "Linear with BatchNorm1d": (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)), (3, 3, 4)),
    "BatchNorm1d along the rows of a Linear": (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), (3, 6, 6)),
    "an end of ReLU and NCReLU": (nn.Sequential(conv(), nn.ReLU(), NCReLU()), X),
    "ReLU, NCReLU, batch norm": (nn.Sequential(nn.ReLU(), NCReLU(), nn.BatchNorm2d(8)), X),
    "pools in 1-D": (nn.Sequential(DiracConv1d(4, 4, 3), nn.MaxPool1d(2), nn.BatchNorm1d(4)), (2, 4, 9)),
    "pools in 3-D": (nn.Sequential(DiracConv3d(4, 4, 3), nn.MaxPool3d(2), nn.AvgPool3d(1)), (2, 4, 6, 6, 6)),
    "AvgPool2d": (nn.Sequential(conv(), nn.AvgPool2d(3, 2, 1), nn.BatchNorm2d(4)), X),
    "AvgPool2d without its zeros": (nn.Sequential(conv(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)), X),
    "Dropout and Identity": (nn.Sequential(conv(), nn.Dropout(), nn.Identity(), nn.BatchNorm2d(4)), X),
    "LeakyReLU": (nn.Sequential(conv(), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)), X),
    "SyncBatchNorm": (nn.Sequential(conv(), nn.SyncBatchNorm(4)), X),
    "batch norm before padding": (nn.Sequential(nn.BatchNorm2d(4), conv()), X),
    "batch norm before no padding": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), X),
    "1x1 before 3x3 with padding": (nn.Sequential(nn.Conv2d(4, 4, 1), conv()), X),
    "1x1 before 3x3": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)), X),
    "every other pixel before 1x1": (nn.Sequential(nn.AvgPool2d(1, 2), nn.MaxPool2d(1, 1), conv(size=1, stride=2)), X),
    "every other pixel before 3x3": (nn.Sequential(nn.MaxPool2d(1, 2), conv()), X),
    "3x3 means before 1x1": (nn.Sequential(nn.AvgPool2d(3, 2), conv(size=1)), X),
    "every other pixel before padded 1x1": (nn.Sequential(nn.AvgPool2d(1, 2), nn.Conv2d(4, 4, 1, padding=1)), X),
    "strided 3x3 before 1x1": (nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1, 1)), X),
    "branches of other sizes": (Sum(conv(), conv(size=1), conv(size=5), nn.BatchNorm2d(4), nn.Identity()), X),
    "depthwise beside dense": (Sum(conv(groups=4), conv(), conv(groups=2)), X),
    "a dilated branch": (Sum(nn.Conv2d(4, 4, 3, padding=2, dilation=2), conv(size=5), conv(size=1)), X),
    "an average pool beside a convolution": (Sum(nn.AvgPool2d(3, 1, 1), conv()), X),
    "an average pool that leaves zeros out": (Sum(nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv()), X),
    "strided branches": (Sum(conv(stride=2), conv(size=1, stride=2)), X),
    "a quotient by a whole number": (Lambda(lambda x, a: a(x) / torch.tensor(3), conv()), X),
    "zeros on two sides": (nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(4, 4, 3, padding="same")), X),
}
MERGED = {
    "branches of other sizes": 1,
    "depthwise beside dense": 1,
    "a dilated branch": 1,
    "an average pool beside a convolution": 1,
    "an average pool that leaves zeros out": 1,
    "strided branches": 1,
    "1x1 before 3x3": 1,
    "1x1 before 3x3 with padding": 2,
    "strided 3x3 before 1x1": 1,
    "batch norm before no padding": 1,
    "batch norm before padding": 2,
}


def test_a_1x1_convolution_takes_the_stride_of_a_pool_that_only_leaves_pixels_out():
    net, shape = RIGHT["every other pixel before 1x1"]
    graph = fold(net.eval(), noise(*shape)).graph
    assert [(node.op, node.attributes["stride"]) for node in graph.nodes if node.op != "input"] == [("conv", [4, 4])]


@pytest.mark.parametrize("name", RIGHT)
def test_any_net_folds_to_its_own_outputs(name):
    net, shape = RIGHT[name]
    net = moved(net)
    plain = fold(net, noise(*shape))
    assert error(net, plain, noise(*shape)) < TOLERANCE
    if name in MERGED:
        assert plain.graph.count("conv") == MERGED[name]


@pytest.mark.parametrize("name", ["ReLU, NCReLU, grouped convolution", "ReLU, nested NCReLU, Dirac", "LeakyReLU"])
def test_chains_fold_without_an_example(name):
    net, shape = RIGHT[name]
    assert error(moved(net), fold(net), noise(*shape)) < TOLERANCE


class Columns(nn.Module):
    def forward(self, x):
        return x * torch.arange(6.0)


def hooked():
    net = nn.Sequential(conv(), nn.ReLU())
    net[1].register_forward_hook(lambda module, args, output: output + 1)
    return net.eval()


class Twisted(nn.Module):
    """Layers that do not run in the order of their modules."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList([conv(), conv(size=1, groups=2)])
        self.second = conv()

    def forward(self, x):
        return self.first[1](self.second(self.first[0](x).relu()).relu())


class Rectified(nn.Conv2d):
    """A layer with a function inside."""

    def forward(self, input):
        return F.conv2d(input, self.weight, self.bias).relu()


@pytest.mark.parametrize("net", [Twisted(), nn.Sequential(Rectified(4, 4, 3), conv())], ids=["order", "inside"])
def test_names_may_be_in_any_order_and_inside_each_other(net):
    net = moved(net)
    assert error(net, fold(net, noise(*X)), noise(*X)) < TOLERANCE


def test_tensors_are_buffers_of_the_net_and_follow_it():
    plain = fold(moved(nn.Sequential(conv(), nn.ReLU(), conv())))
    copy = deepcopy(plain).float()
    names = [f"nodes.{name}" for name in plain.graph.tensors()]
    assert names == ["nodes.0.weight", "nodes.0.bias", "nodes.2.weight", "nodes.2.bias"] == [*plain.state_dict()]
    assert {tensor.dtype for tensor in copy.graph.tensors().values()} == {torch.float32}
    assert {tensor.dtype for tensor in plain.graph.tensors().values()} == {torch.float64}
    copy.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in copy.state_dict().items()})
    assert not copy(noise(*X).float()).any()
    assert plain(noise(*X)).any()
    assert str(plain) == (
        "GraphNet(\n  input: input\n  0: conv weight [4, 4, 3, 3] bias [4] of input\n  1: relu of 0\n"
        "  2: conv weight [4, 4, 3, 3] bias [4] of 1\n)"
    )


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


REFUSED = {
    "hooks": (hooked(), r"1 have hooks"),
    "batch norm without statistics": (
        nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        r"1 \(BatchNorm2d: batch norm without running statistics",
    ),
    "batch norm in training mode": (
        nn.Sequential(conv(), nn.BatchNorm2d(4)),
        r"1 in training mode; call net\.eval\(\)",
    ),
    "Upsample": (nn.Sequential(nn.Upsample(scale_factor=2)), r"0 \(Upsample\)"),
    "control flow": (Branching(), r"cannot be traced, .*control flow"),
    "an overwritten value": (Overwritten(), r"overwrites a value that 1 others read"),
    "x += y of a value that is read again": (AddedInPlace(late=True), r"iadd overwrites a value that 1 others read"),
    "a value overwritten by a function": (
        Lambda(lambda x, a: (lambda y: F.relu_(y) + y)(a(x)), conv()),
        r"relu_ overwrites a value that 1 others read",
    ),
    "a view that is overwritten": (
        Lambda(lambda x, a: (lambda y: F.relu(y[:, :2].contiguous(), inplace=True) + y[:, :2])(a(x)), conv()),
        r"relu overwrites a value that 1 others read",
    ),
    "a value of which a view is read": (
        Lambda(lambda x, a: (lambda y: (lambda flat: y.div_(2).flatten(1) + flat)(y.flatten(1)))(a(x)), conv()),
        r"div_ overwrites a value that 1 others read",
    ),
    "a quotient that is rounded": (Lambda(lambda x: torch.div(x, 0.3, rounding_mode="floor")), r"div \(div\)"),
    "reflection": (nn.Sequential(conv(padding_mode="reflect")), r"0 \(Conv2d: padding with reflect"),
    "one channel that becomes four": (
        Lambda(lambda x, a: a(x) * torch.arange(1.0, 5).view(4, 1, 1), conv(4, 1)),
        r"mul of a constant that gives a value more channels or pixels",
    ),
    "rows of an image": (Lambda(lambda x: x[:, 1:3, 0:2]), r"indexing with \(slice.* only of channels is supported"),
    "images of a batch": (Lambda(lambda x: x[0:1, 1:3]), r"indexing with \(slice.* only of channels is supported"),
    "every second channel": (Lambda(lambda x: x[:, ::2]), r"indexing with \(slice.* only of channels is supported"),
    "a new dimension": (Lambda(lambda x: x[:, 1:3, None]), r"indexing with \(slice.* only of channels is supported"),
    "one channel": (Lambda(lambda x: x[:, 1]), r"indexing with \(slice.* only of channels is supported"),
    "a scale for each column": (Columns(), r"constants of shape \[6\] that are not one for each channel"),
    "reflection as a layer": (nn.Sequential(nn.ReflectionPad2d(1)), r"0 \(ReflectionPad2d\)"),
    "padding that cuts off": (nn.Sequential(nn.ZeroPad2d((1, -1, 0, 0))), r"0 \(ZeroPad2d: padding with anything but"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_is_refused_by_name(name):
    net, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        fold(net, noise(*X))


def test_what_is_not_merged_is_said_with_its_reason():
    blocked = fold(moved(Sum(conv(stride=2), nn.MaxPool2d(1, 2))), noise(*X)).graph.blocked
    assert not blocked
    (reason,) = fold(moved(Sum(conv(size=1), conv(size=7, groups=4))), noise(*X)).graph.blocked
    assert "not merged: one convolution would have" in reason
    (reason,) = fold(moved(nn.Sequential(nn.BatchNorm2d(4), conv())), noise(*X)).graph.blocked
    assert reason.endswith("its shift is missing in the zeros that are padded")


def test_fold_of_a_graph_leaves_the_net_alone():
    net = moved(PlusBody())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fold(net, noise(*X))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_graph_survives_json_and_refuses_operations_that_are_not_listed():
    net = moved(PlusBody())
    plain = fold(net, noise(*X))
    graph = plain.graph
    entries = json.loads(json.dumps(graph.to_dict()))
    again = GraphNet(Graph.from_dict(entries, graph.tensors()))
    assert torch.equal(again(noise(*X)), plain(noise(*X)))
    entries[-1]["op"] = "eval"
    with pytest.raises(Refusal, match="eval is not one of"):
        Graph.from_dict(entries, graph.tensors())
    with pytest.raises(Refusal, match="damaged"):
        Graph.from_dict([{"name": 1}], {})


def test_ncrelu_is_traced_as_one_node_and_takes_an_image_without_its_batch():
    traced = torch.fx.symbolic_trace(nn.Sequential(NCReLU()))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [ncrelu]
    image = noise(3, 4, 5)
    assert torch.equal(NCReLU(dims=2)(image), NCReLU()(image[None])[0])
    with pytest.raises(Refusal, match=r"takes \[C, \.\.\.\] or \[N, C, \.\.\.\]"):
        NCReLU(dims=2)(noise(4, 5))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_an_even_kernel_is_padded_more_at_its_end():
    net = moved(nn.Sequential(nn.Conv2d(4, 4, (4, 2), padding="same"), nn.BatchNorm2d(4)))
    plain = fold(net, noise(*X))
    assert plain.graph.nodes[1].attributes["padding"] == [[1, 2], [0, 1]]
    assert error(net, plain, noise(*X)) < TOLERANCE


def test_branches_that_become_one_keep_the_name_of_the_larger():
    for branches, name in (((conv(), conv(size=1)), "branches.0"), ((conv(size=1), conv()), "branches.1")):
        assert fold(moved(Sum(*branches)), noise(*X)).graph.nodes[1].name == name


def test_a_constant_for_each_channel_needs_an_example():
    net = Lambda(lambda x, a: a(x) * torch.arange(1.0, 5).view(4, 1, 1), conv()).eval()
    with pytest.raises(TypeError, match=r"mul of a constant for each channel: give an example batch"):
        fold(net)
    assert fold(net, noise(*X)).graph.count("conv") == 1


class Halved(nn.Module):
    """Calls the function, imported by its name, as a forward of somebody else's does."""

    def __init__(self):
        super().__init__()
        self.conv = conv(8)

    def forward(self, x):
        return self.conv(ncrelu(x, 2))


def test_a_function_that_a_forward_imported_is_seen_whole():
    net = moved(nn.Sequential(Halved(), NCReLU(dims=2), conv(8)))
    plain = fold(net, noise(*X))
    assert plain.graph.count("ncrelu") == 2
    assert error(net, plain, noise(*X)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize(("dims", "shape"), [(None, X), (2, X), (2, (4, 7, 6)), (1, (4, 9)), (3, (4, 2, 3, 5))])
def test_ncrelu_is_scripted_and_traced_with_the_outputs_of_equation_9(dims, shape):
    x = noise(*shape)
    axis = 1 if len(shape) == 4 and dims in (None, 2) else 0
    expected = torch.cat([x * (x > 0), x * (x < 0)], dim=axis)
    layer = NCReLU() if dims is None else NCReLU(dims=dims)
    for form in (layer, torch.jit.script(layer), torch.jit.trace(layer, x), torch.fx.symbolic_trace(layer)):
        assert torch.equal(form(x), expected)


def test_ncrelu_takes_an_image_for_a_batch_where_nothing_tells_them_apart():
    """[C, H, W] is [N, C, L] to a layer that does not know its dimensions: the fold asks for a batch."""
    assert NCReLU()(noise(3, 4, 5)).shape == (3, 8, 5)
    assert NCReLU(dims=2)(noise(3, 4, 5)).shape == (6, 4, 5)
    with pytest.raises(TypeError, match=r"2 spatial dimensions reads 3 dimensions: give a batch"):
        fold(nn.Sequential(conv(3), NCReLU(dims=2)).eval(), noise(3, 4, 5).float())
