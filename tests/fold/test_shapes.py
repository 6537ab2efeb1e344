"""A plain file whose graph is changed by hand: refused, by node, before a number is touched."""

import json

import own_nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from common.refusal import Refusal
from common.spec import ImageSpec, Spec
from fold.graph import GraphNet, fold
from fold.nodes import Graph, Node
from fold.plain import load_plain, save_plain
from fold.shapes import infer_shapes, pooled
from fold.sources import from_user

SPEC = Spec.of_net("net", ImageSpec(33, 30, 3, (0.1,) * 3, (0.5,) * 3, None), tuple("abcde"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a whole file."""
    path = tmp_path_factory.mktemp("sound") / "plain.safetensors"
    stated = {"image_size": (33, 30), "mean": SPEC.image.mean, "std": SPEC.image.std, "labels": SPEC.labels}
    source = from_user(f"{own_nets.__file__}:this_morning", None, None, **stated)
    save_plain(path, source.plain.float(), source.spec, {})
    return path.read_bytes()


def parts(content):
    size = int.from_bytes(content[:8], "little")
    return load(content), json.loads(content[8 : 8 + size])["__metadata__"]


@pytest.fixture
def refused(sound, tmp_path):
    """What is said of a file that `change(nodes by name, tensors, metadata)` has been at."""

    def refuse(change):
        tensors, metadata = parts(sound)
        nodes = json.loads(metadata["graph"])
        change({node["name"]: node for node in nodes}, tensors, nodes)
        path = tmp_path / "plain.safetensors"
        path.write_bytes(save(tensors, {**metadata, "graph": json.dumps(nodes)}))
        with pytest.raises(Refusal) as refusal:
            load_plain(path)
        assert str(refusal.value).startswith(f"{path}")
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    return refuse


def test_a_sound_file_loads_as_it_was(sound, tmp_path, images):
    path = tmp_path / "plain.safetensors"
    path.write_bytes(sound)
    plain = load_plain(path)
    assert isinstance(plain.net, GraphNet)
    assert plain.spec.labels == SPEC.labels
    save_plain(path, plain.net, plain.spec, {})
    (before, said), (after, again) = parts(sound), parts(path.read_bytes())
    assert said == again
    assert all(torch.equal(before[name], after[name]) for name in {*before, *after})


def set_attribute(node, key, value):
    return lambda nodes, tensors, order: nodes[node]["attributes"].__setitem__(key, value)


def set_field(node, key, value):
    return lambda nodes, tensors, order: nodes[node].__setitem__(key, value)


def set_tensor(name, tensor):
    return lambda nodes, tensors, order: tensors.__setitem__(name, tensor)


HOSTILE = {
    "an operation that is not listed": (set_field("stem.relu", "op", "eval"), "stem.relu: eval is not one of"),
    "an input in the middle": (set_field("stem.relu", "op", "input"), "stem.relu: input is not one of"),
    "a window of a billion": (
        set_attribute("pool", "size", [10**9, 1]),
        "pool: max_pool has missing or invalid attributes",
    ),
    "no window": (lambda nodes, t, o: nodes["pool"]["attributes"].pop("size"), "missing or invalid attributes: size"),
    "a stride of zero": (
        set_attribute("stem.large.0", "stride", [0, 1]),
        "stem.large.0: conv has missing or invalid attributes",
    ),
    "padding without end": (set_attribute("stem.large.0", "padding", [[60000] * 2] * 2), "would give"),
    "padding of one dimension": (set_attribute("stem.large.0", "padding", [[1, 1]]), "for 2 spatial dimensions"),
    "a filter without a window": (set_tensor("body.2.down.weight", torch.zeros(32, 32)), "of [32, 32] reads"),
    "a fraction of a group": (set_attribute("body.2.wide", "groups", 31), "body.2.wide: conv of [32, 1, 7, 7] reads"),
    "text for a number": (set_attribute("body.2.wide", "groups", "32"), "missing or invalid attributes: groups"),
    "true for a number": (set_attribute("stem.large.0", "groups", True), "missing or invalid attributes: groups"),
    "an attribute too many": (set_attribute("stem.relu", "code", "import os"), "missing or invalid attributes: code"),
    "infinity": (
        lambda n, t, o: n["hardswish"].update(op="leaky_relu", attributes={"slope": 1e999}),
        "missing or invalid attributes",
    ),
    "more than PyTorch's whole numbers": (
        lambda n, t, o: n["hardswish"].update(op="clip", attributes={"low": -(10**30), "high": 6}),
        "hardswish: clip has missing or invalid attributes: low",
    ),
    "more than any float": (
        lambda n, t, o: n["hardswish"].update(op="leaky_relu", attributes={"slope": 10**400}),
        "missing or invalid attributes: slope",
    ),
    "two inputs of one": (set_field("stem.relu", "inputs", ["stem.large.0"] * 2), "stem.relu: relu reads 2 nodes"),
    "no inputs": (set_field("cat", "inputs", []), "cat: cat reads 0 nodes"),
    "a later input": (set_field("stem.relu", "inputs", ["logits_"]), "too early"),
    "a name twice": (set_field("stem.relu", "name", "stem.large.0"), "the graph uses a name twice"),
    "a name that is a path": (
        lambda nodes, t, o: (nodes["flatten"].update(name="../x"), nodes["logits_"].update(inputs=["../x"])),
        "'../x' cannot be the name of a node",
    ),
    "a name of the export's": (
        lambda nodes, t, o: (nodes["flatten"].update(name="images"), nodes["logits_"].update(inputs=["images"])),
        "'images' cannot be the name",
    ),
    "channels that do not fit": (set_field("body.2.down", "inputs", ["body.1.relu"]), "reads [32, "),
    "sums that do not fit": (set_field("body.2.add", "inputs", ["body.2.down", "stem.relu"]), "add reads [32, "),
    "other shapes": (
        set_tensor("logits_.bias", torch.zeros(4)),
        "bias is of shape [4], not [5]",
    ),
    "whole numbers": (
        set_tensor("logits_.bias", torch.zeros(5, dtype=torch.int32)),
        "is of torch.int32, not",
    ),
    "a tensor too many": (set_tensor("more.weight", torch.zeros(4)), "reads none of more.weight"),
    "a tensor too few": (lambda nodes, tensors, o: tensors.pop("logits_.bias"), "is damaged: KeyError"),
    "NaN": (set_tensor("logits_.bias", torch.full((5,), torch.nan)), "NaN or infinite values in logits_.bias"),
    "no order": (lambda nodes, t, order: order.reverse(), "is not one of"),
    "nothing": (lambda nodes, t, order: order.clear(), "the graph"),
    "no node": (lambda nodes, t, order: order.append(7), "is damaged"),
    "another end": (lambda nodes, t, order: order.append({**order[-2], "name": "x"}), "x gives [64] for each image"),
    "a million nodes": (
        lambda nodes, t, order: order.extend(
            {"name": f"n{i}", "op": "relu", "inputs": ["stem.relu"], "attributes": {}, "tensors": [], "equals": ""}
            for i in range(10_001)
        ),
        "over the limit of 10,000",
    ),
    "pixels that are not normalized": (set_field("stem.large.0", "inputs", ["input"]), "reads [33, 30, 3]: "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_graph_that_does_not_fit_is_refused(name, refused):
    change, message = HOSTILE[name]
    assert message in refused(change)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", '"relu"', "[[]]"])
def test_text_that_is_not_a_graph_is_refused(text, sound, tmp_path):
    tensors, metadata = parts(sound)
    (tmp_path / "plain.safetensors").write_bytes(save(tensors, {**metadata, "graph": text}))
    with pytest.raises(Refusal, match=r"plain\.safetensors.* (damaged|no operation)"):
        load_plain(tmp_path / "plain.safetensors")


VALUES = st.integers(-3, 70_000) | st.floats() | st.booleans() | st.none() | st.text(max_size=3)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.integers(0, 999), st.booleans(), st.integers(0, 99), VALUES | st.lists(VALUES | st.lists(VALUES)))
def test_whatever_is_changed_it_loads_or_is_refused(sound, tmp_path_factory, which, of_attributes, key, value):
    """No other exception, whatever value stands in any place of the graph."""
    tensors, metadata = parts(sound)
    nodes = json.loads(metadata["graph"])
    node = nodes[which % len(nodes)]
    place = node["attributes"] if of_attributes and node["attributes"] else node
    place[sorted(place)[key % len(place)]] = value
    path = tmp_path_factory.mktemp("changed") / "plain.safetensors"
    path.write_bytes(save(tensors, {**metadata, "graph": json.dumps(nodes)}))
    try:
        net = load_plain(path).net
    except Refusal:
        return
    assert net(torch.zeros(1, 33, 30, 3, dtype=torch.uint8)).shape == (1, 5)


@pytest.mark.parametrize("make", [own_nets.this_morning, own_nets.everything, own_nets.chain])
def test_shapes_are_those_that_the_net_gives(make):
    x = torch.randn(2, 3, 33, 30)
    plain = fold(own_nets.moved(make()), x)
    shapes = infer_shapes(plain.graph, tuple(x.shape[1:]))
    assert shapes == {name: tuple(value.shape[1:]) for name, value in plain.values(x.double())}


@pytest.mark.parametrize("ceil", [False, True])
def test_windows_are_counted_as_pytorch_counts_them(ceil):
    for size in range(3, 12):
        for window in range(1, 5):
            for stride in range(1, 5):
                for padding in range(window // 2 + 1):
                    x = torch.zeros(1, 1, size)
                    if size + 2 * padding < window:
                        continue
                    pool = torch.nn.functional.max_pool1d(x, window, stride, padding, ceil_mode=ceil)
                    assert pooled(size, window, stride, padding, 1, ceil=ceil) == pool.shape[-1]


NORMALIZE = Node("normalize", "normalize", ("input",), {}, dict.fromkeys(("offset", "scale"), torch.ones(3, 1, 1)))


@pytest.mark.parametrize("beside", [(), (NORMALIZE,)])
def test_nothing_is_written_where_the_graph_does_not_fit(tmp_path, beside):
    nodes = (Node("input", "input", (), {"rank": 4}), *beside, Node("relu", "relu", ("input",)))
    with pytest.raises(Refusal, match="relu: a plain net of images begins with normalize"):
        save_plain(tmp_path / "plain.safetensors", GraphNet(Graph(nodes)), SPEC, {})
    assert not list(tmp_path.iterdir())
