"""A reference in a model's file: what it counts, that the graph stays, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from common.cli import run_command
from common.files import sha256
from common.refusal import Refusal
from export.evaluate import EvaluateConfig, command
from export.graphs.graph import to_onnx
from export.metadata import store_reference
from export.model_file.engine_card import card_path, read_card
from export.model_file.onnx_reader import read_header, with_metadata
from export.model_file.reference import NUM_BINS, Reference, count, read_reference
from export.runtimes.onnx_session import OnnxSession
from export.runtimes.runtime import best, probabilities
from fold.graph import fold
from train.data import datasets


@pytest.fixture
def digits_net(write_onnx, tmp_path, make_net, make_spec):
    """A net for the images of digits."""
    info = datasets.info_of("digits")
    fields = {"num_labels": 10, "channels": 1}
    spec = replace(make_spec(**fields), labels=info.labels)
    path = tmp_path / "digits.onnx"
    path.write_bytes(to_onnx(fold(make_net(**fields)), spec, {"training": {"dataset": "digits"}}).SerializeToString())
    return path


@pytest.fixture
def answers():
    return np.random.default_rng(0).dirichlet(np.ones(10), 40)


def counted(values):
    order = best(values, 2)
    return count(order, np.take_along_axis(values, order, axis=1), values.shape[1])


def test_the_file_is_the_earlier_one_with_an_entry_behind_it(write_onnx, answers, images):
    _, path = write_onnx()
    before, old = path.read_bytes(), OnnxSession(path)
    path.with_suffix(".json").write_text(json.dumps({"artefacts": {"plain.onnx": old.model.digest}}))
    path.with_suffix(".note.json").write_text("{}")
    told, hint = store_reference(path, answers, what="forty")
    assert path.read_bytes().startswith(before)
    onnx.checker.check_model(str(path))
    new = OnnxSession(path)
    assert new.model.digest == sha256(path.read_bytes()) != old.model.digest
    assert told.endswith(f"its digest is now {new.model.digest}")
    assert hint == "these name the earlier digest, make them again where they are needed: plain.json"
    assert np.array_equal(new(images()), old(images()))
    found = read_reference(new.model.provenance["reference"], 10)
    assert (found.what, found.of, found.num_images) == ("forty", old.model.digest, 40)
    assert np.array_equal(found.counts, counted(answers))
    assert with_metadata(path, path.read_bytes(), {"reference": None}) == before


def test_another_reference_takes_the_place_of_the_first_and_the_same_changes_nothing(write_onnx, answers):
    _, path = write_onnx()
    before = path.read_bytes()
    store_reference(path, answers, what="forty")
    first = path.read_bytes()
    store_reference(path, answers, what="forty")
    assert path.read_bytes() == first
    store_reference(path, answers[:30], what="thirty")
    record = read_header(path, path.read_bytes()).provenance["reference"]
    assert (record["what"], record["images"], record["of"]) == ("thirty", 30, sha256(before))
    assert with_metadata(path, path.read_bytes(), {"reference": None}) == before


def test_a_reference_inside_a_file_that_another_tool_wrote_again_is_replaced(write_onnx, answers):
    _, path = write_onnx()
    store_reference(path, answers, what="forty")
    path.write_bytes(onnx.load(path).SerializeToString())  # the metadata no longer stand at the end
    store_reference(path, answers[:30], what="thirty")
    assert [entry.key for entry in onnx.load(path).metadata_props].count("reference") == 1
    assert read_header(path, path.read_bytes()).provenance["reference"]["what"] == "thirty"


def test_somebody_elses_net_has_a_reference_too(write_foreign, answers):
    path = write_foreign()
    store_reference(path, answers[:, :4] / answers[:, :4].sum(1, keepdims=True), what="forty")
    provenance = OnnxSession(path).model.provenance
    assert list(provenance) == ["reference"]
    assert read_reference(provenance["reference"], 4).num_images == 40


@pytest.mark.slow
def test_an_engine_has_it_in_its_card_and_keeps_its_digest(built, answers):
    engine, card = built.read_bytes(), read_card(built)
    store_reference(built, answers, what="forty")
    after = read_card(built)
    assert built.read_bytes() == engine
    assert after.engine_sha256 == card.engine_sha256
    found = read_reference(after.provenance["reference"], 10)
    assert (found.num_images, found.of) == (40, card.engine_sha256)
    assert {**json.loads(card_path(built).read_text()), "provenance": 0} == {
        **json.loads(card.to_json()),
        "provenance": 0,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 1}, "not of the format"),
        ({"edges": [1.0]}, "other bins"),
        ({"what": None}, "what it was counted on"),
        ({"of": 7}, "what it was counted on"),
        ({"images": 0}, "over 0 images"),
        ({"images": True}, "over True images"),
        ({"images": 2**60}, "over 1152921504606846976 images"),
        ({"images": 41}, "classes in the reference counts 40 images, not 41"),
        ({"classes": [40]}, "classes in the reference is not a list of 10 counts"),
        ({"classes": {}}, "classes in the reference is not a list of 10 counts"),
        ({"margin": [40, *[0] * NUM_BINS]}, f"margin in the reference is not a list of {NUM_BINS} counts"),
        ({"margin": [41, -1, *[0] * (NUM_BINS - 2)]}, f"margin in the reference is not a list of {NUM_BINS} counts"),
        ({"margin": [40.0, *[0] * (NUM_BINS - 1)]}, f"margin in the reference is not a list of {NUM_BINS} counts"),
    ],
)
def test_a_bad_reference_is_refused_by_field(answers, fields, message):
    record = Reference("forty", "0", counted(answers)).to_dict()
    assert read_reference(json.loads(json.dumps(record)), 10).to_dict() == record
    with pytest.raises(Refusal, match=message):
        read_reference({**record, **fields}, 10)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "1e999", '"\\ud800"', "\u2028"])
def test_whatever_stands_there_the_file_is_read(write_onnx, text):
    _, path = write_onnx()
    path.write_bytes(with_metadata(path, path.read_bytes(), {"reference": text}))
    with pytest.raises(Refusal, match="not of the format"):
        read_reference(OnnxSession(path).model.provenance["reference"], 10)


@pytest.mark.slow
def test_evaluate_stores_what_it_counted(digits_net, tmp_path, capsys):
    argv = [str(digits_net), "--out", str(tmp_path / "report")]
    before = digits_net.read_bytes()
    assert run_command(command, EvaluateConfig, argv=argv) == 0
    assert digits_net.read_bytes() == before
    assert run_command(command, EvaluateConfig, argv=[*argv, "--store-reference"]) == 0
    session = OnnxSession(digits_net)
    output = capsys.readouterr().out.replace("\n", "")
    assert f"its digest is now {session.model.digest}" in output
    found = read_reference(session.model.provenance["reference"], 10)
    values = probabilities(session(np.asarray(datasets.load("digits").test.images)))
    assert (found.what, found.num_images) == ("test images of digits", 359)
    assert np.array_equal(found.counts, counted(values))


def test_evaluate_refuses_a_reference_for_what_is_not_served(tmp_path, capsys):
    path = tmp_path / "plain.safetensors"
    assert run_command(command, EvaluateConfig, argv=[str(path), "--store-reference"]) == 2
    assert "a reference is for what is served: name the .onnx or .engine made of" in capsys.readouterr().err
