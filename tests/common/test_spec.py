import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.refusal import Refusal
from common.spec import ImageSpec, Spec

positive = st.floats(1e-3, 10)
sizes = st.integers(1, 64)


@st.composite
def specs(draw):
    channels = draw(st.sampled_from([1, 3]))
    height, width = draw(sizes), draw(sizes)
    image = ImageSpec(
        height,
        width,
        channels,
        mean=tuple(draw(positive) for _ in range(channels)),
        std=tuple(draw(positive) for _ in range(channels)),
        resize=draw(st.none() | st.integers(max(height, width), 300)),
    )
    labels = tuple(draw(st.lists(st.text(max_size=8), min_size=2, max_size=5)))
    nonlinearity = draw(st.sampled_from(["ncrelu", "relu"]))
    temperature = draw(st.just(1.0) | st.floats(0.01, 100))
    return Spec(
        "cifar", draw(st.integers(10, 100)), draw(positive), nonlinearity, image, labels, temperature=temperature
    )


@given(specs())
def test_a_spec_survives_the_journey_as_json(spec):
    assert Spec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"depth": 34, "width": 2.0}, "DiracNet-34-2"),
        ({"depth": 28, "width": 0.25, "parameterization": "per-channel"}, "DiracNet-28-0.25"),
        ({"family": "wrn", "depth": 16, "width": 4.0, "parameterization": "plain"}, "WRN-16-4"),
        ({"parameterization": "initialised", "depth": 10, "width": 1.0}, "Plain-10-1"),
        ({"net": "mine"}, "mine"),
    ],
)
def test_a_net_is_called_by_what_it_is(make_spec, fields, name):
    assert dataclasses.replace(make_spec(), **fields).name == name


@pytest.mark.parametrize("damage", ["missing", "unknown", "type", "image", "number"])
def test_a_damaged_spec_is_refused_in_one_line(make_spec, damage):
    fields = json.loads(make_spec().to_json())
    match damage:
        case "missing":
            del fields["labels"]
        case "unknown":
            fields["colour"] = "red"
        case "type":
            fields["depth"] = 10.5
        case "image":
            fields["image"]["height"] = "8"
        case "number":
            fields["image"]["mean"][0] = 10**400  # JSON has no largest number
    with pytest.raises(Refusal, match="the model's spec is damaged"):
        Spec.from_dict(fields)


def test_text_that_is_no_json_is_refused():
    for text in ("", "{", "[]", "null", "3"):
        with pytest.raises(Refusal, match="the model's spec is"):
            Spec.from_json(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 2}, "images must have 1 or 3 channels, got 2"),
        ({"mean": (0.5,)}, "mean and std need 3 values each"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"height": 0}, "cannot crop 0x8"),
        ({"resize": 7}, "cannot crop 8x8 from images resized to 7"),
    ],
)
def test_an_impossible_image_is_refused(make_spec, fields, message):
    with pytest.raises(Refusal, match=message):
        dataclasses.replace(make_spec().image, **fields)


def test_an_impossible_classifier_is_refused(make_spec):
    with pytest.raises(Refusal, match="two labels or more, got 1"):
        dataclasses.replace(make_spec(), labels=("one",))
    with pytest.raises(Refusal, match="nonlinearity must be one of ncrelu, relu, got tanh"):
        dataclasses.replace(make_spec(), nonlinearity="tanh")


@pytest.mark.parametrize(
    "value", [0, 0.0, -0.7, 1e-9, 1e9, 10**400, float("nan"), float("inf"), "0.7", None, True, [0.7], {}]
)
def test_a_hostile_temperature_is_refused(make_spec, value):
    with pytest.raises(Refusal, match=r"a temperature must be a number from 0\.01 to 100, got .{1,40}$"):
        Spec.from_dict(make_spec().to_dict() | {"temperature": value})
    with pytest.raises(Refusal, match="a temperature must be a number"):
        Spec.from_dict(Spec.of_net("theirs", make_spec().image, ("a", "b")).to_dict() | {"temperature": value})


def test_a_file_of_before_there_were_temperatures_has_one_of_1_and_stays_as_it_was(make_spec):
    fields = make_spec().to_dict()
    assert "temperature" not in fields
    assert Spec.from_dict(fields).temperature == 1
    for spec in (make_spec(), Spec.of_net("theirs", make_spec().image, ("a", "b"))):
        warm = dataclasses.replace(spec, temperature=0.7)
        assert warm.to_dict() == spec.to_dict() | {"temperature": 0.7}
        assert Spec.from_json(warm.to_json()) == warm


def test_a_net_that_is_not_of_this_project_has_a_name_and_no_family():
    spec = Spec.of_net("repvgg_a0", ImageSpec(4, 5, 1, (0.5,), (0.5,), None), ("a", "b"))
    assert spec.name == "repvgg_a0"
    assert spec.to_dict().keys() == {"net", "image", "labels"}
    assert Spec.from_json(spec.to_json()) == spec
    with pytest.raises(Refusal, match="damaged"):
        Spec.from_dict({**spec.to_dict(), "depth": 10})
