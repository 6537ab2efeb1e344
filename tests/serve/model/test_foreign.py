"""Somebody else's classifiers: answered as their own code answers, or refused with what to do."""

import json
import os
import shutil

import numpy as np
import onnx
import pytest
import torch
from foreign import MEAN, SAID, SHEET, STD, Two, net, split, write, write_today
from starlette.testclient import TestClient

from common.cli import parse
from common.refusal import Refusal
from export.model_file.reading import from_flags
from export.runtimes.load import load_runtime
from export.runtimes.onnx_session import OnnxSession
from serve.cluster import read_artefact
from serve.config import ServeConfig
from serve.processes.serving import _runtime_line, load
from serve.request.app import make_app
from serve.request.limits import Limits


def said(*argv):
    """What these arguments of serve/run.py say."""
    return from_flags(parse(ServeConfig, argv=argv))


def flags(name):
    """Those that normalize inside, or say themselves how they are read, are told nothing."""
    return () if "bytes" in name or name == "timm" else SAID


def ask(runtime, sample, encode):
    """(classes, probabilities [4, 10]) over HTTP, all images in one request and each alone."""
    with TestClient(make_app(runtime, Limits())) as client:
        files = [("image", (f"{i}.png", encode(image), "image/png")) for i, image in enumerate(sample.images)]
        together = client.post("/predict?top_k=10", files=files).json()["results"]
        alone = [client.post("/predict?top_k=10", files=[file]).json()["results"][0] for file in files]
    answers = []
    for results in (together, alone):
        probabilities = np.zeros((4, 10))
        for row, result in zip(probabilities, results, strict=True):
            for guess in result["top"]:
                row[guess["index"]] = guess["probability"]
        answers.append(([result["index"] for result in results], probabilities))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", SHEET)
def test_the_server_answers_as_its_own_code(name, tmp_path, encode, monkeypatch):
    sample = SHEET[name](tmp_path)
    monkeypatch.chdir("/")
    (runtime,) = load(parse(ServeConfig, argv=[str(sample.path), *flags(name)]))
    for classes, probabilities in ask(runtime, sample, encode):
        assert classes == sample.probabilities.argmax(1).tolist()
        np.testing.assert_allclose(probabilities, sample.probabilities, atol=1e-4)


@pytest.fixture
def sample(tmp_path):
    return SHEET["plain"](tmp_path)


def test_what_is_assumed_is_said_at_the_start_and_by_the_model(sample):
    runtime = OnnxSession(sample.path)
    line = _runtime_line(runtime)
    assert "not a file of this project" in line
    assert (
        "assumed: mean 0 0 0, std 1 1 1, images stretched to its input, RGB, answers logits, labels 'class N'" in line
    )
    assert "--mean" in line
    with TestClient(make_app(runtime, Limits())) as client:
        card = client.get("/model").json()
    assert not card.keys() & {"family", "depth", "width", "nonlinearity", "parameterization"}
    assert set(card["reading"]["sources"].values()) == {"assumed"}
    assert (card["reading"]["mean"], card["reading"]["resize"]) == ([0, 0, 0], None)


def test_what_is_said_is_kept_beside_the_file_and_the_command_line_goes_before(sample, tmp_path):
    beside = tmp_path / "plain.onnx.json"
    labels = [f"label {i}" for i in range(10)]
    beside.write_text(json.dumps({"mean": MEAN, "std": STD, "resize": 36, "labels": labels, "channels": "bgr"}))
    model = OnnxSession(sample.path).model
    assert (model.spec.image.mean, model.spec.image.std, model.spec.image.resize) == (MEAN, STD, 36)
    assert model.spec.labels == tuple(labels)
    assert model.reading.sources["channels"] == "plain.onnx.json"
    model = OnnxSession(sample.path, hints=said("--channels", "rgb", "--probabilities")).model
    assert (model.reading.channels, model.reading.scores, model.reading.mean) == ("rgb", "probabilities", MEAN)
    assert model.reading.sources["channels"] == "the command line"


def test_channels_are_turned_round_where_the_net_takes_them_so(sample):
    given = SAID[:1] + SAID[3:0:-1] + SAID[4:5] + SAID[:4:-1]
    turned = OnnxSession(sample.path, hints=said(*given, "--channels", "bgr"))
    plain = OnnxSession(sample.path, hints=said(*given))
    assert np.array_equal(turned(sample.images), plain(np.ascontiguousarray(sample.images[..., ::-1])))
    assert not np.allclose(turned(sample.images), plain(sample.images))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"means": [0]}', "has the unknown fields means; known are"),
        ('{"mean": 3}', r"mean cannot be 3 \(expected: a list of numbers\)"),
        ('{"mean": null}', "mean cannot be None"),
        (json.dumps({"mean": [10**400] * 3}), "not a valid description: int too large to convert to float"),
        ('{"channels": "gbr"}', r"channels cannot be 'gbr' \(expected: \"rgb\" or \"bgr\"\)"),
        (json.dumps({"labels": [*map(str, range(999)), 7]}), r"labels cannot be 7 \(expected: a list of strings\)"),
        (json.dumps({"labels": "x" * 999}), r"labels cannot be 'x{79} \(expected"),
        ('{"mean": [0.5]}', "mean needs a value for each channel, 3 in all, got 0.5"),
        ('{"labels": ["a", "b"]}', r"the net has 10 classes, and plain\.onnx\.json gives 2 labels"),
        ('{"resize": 8}', "cannot crop 32x32 from images resized to 8"),
    ],
)
def test_a_wrong_description_is_refused_in_words(sample, content, message):
    (sample.path.parent / "plain.onnx.json").write_text(content)
    with pytest.raises(Refusal, match=message):
        OnnxSession(sample.path)


def add_metadata(path, **entries):
    model = onnx.load(path)
    onnx.helper.set_model_props(model, entries)
    onnx.save(model, path)


def test_metadata_of_other_exporters_is_read(sample, tmp_path):
    names = {index: f"name {index}" for index in range(10)}
    add_metadata(sample.path, task="classify", names=str(names), imgsz="[32, 32]")
    model = OnnxSession(sample.path).model
    assert (model.spec.labels, model.spec.image.resize) == (tuple(names.values()), 32)
    assert model.reading.sources["mean"] == "Ultralytics' metadata in the file"


def test_files_of_hugging_face_and_timm_beside_the_model_are_read(sample, tmp_path):
    names = {str(index): f"name {index}" for index in range(10)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": names}))
    processor = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 28}, "crop_pct": 0.875}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = OnnxSession(sample.path).model
    assert (model.spec.labels[3], model.reading.mean, model.reading.std) == ("name 3", MEAN, STD)
    assert model.spec.image.resize == 32  # 28 / 0.875
    (tmp_path / "preprocessor_config.json").unlink()
    timm = {"mean": MEAN, "std": STD, "input_size": [3, 32, 32], "crop_pct": 0.8}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": timm, "label_names": list(names.values())}))
    model = OnnxSession(sample.path).model
    assert (model.spec.labels[3], model.reading.std, model.spec.image.resize) == ("name 3", STD, 40)


def test_a_file_of_ours_says_itself_how_it_is_read(artefact):
    with pytest.raises(Refusal, match="says itself how it is read; leave --mean, --std out"):
        OnnxSession(artefact, hints=said(*SAID))


@pytest.mark.parametrize("name", ["mnn", "torch"])
def test_a_runtime_that_reads_only_files_of_ours_takes_no_flags_on_how(artefact, name):
    with pytest.raises(Refusal, match=rf"{name} runs only files of this project.*leave --mean, --std out"):
        load_runtime(artefact, name=name, hints=said(*SAID))


def test_an_engine_takes_no_flags_on_how_it_is_read(tmp_path):
    with pytest.raises(Refusal, match=r"plain\.engine is read as its card says; give --mean and the like to"):
        load_runtime(tmp_path / "plain.engine", hints=said(*SAID))


def test_a_graph_in_training_mode_is_refused_by_the_name_of_its_batch_norm(tmp_path):
    sample = write(tmp_path, "training", net(), training=True)
    with pytest.raises(
        Refusal, match=r"in training mode: the batch norm \S*BatchNormalization normalizes .*; call net\.eval\(\)"
    ):
        OnnxSession(sample.path)


@pytest.mark.slow
def test_todays_exporter_leaves_of_training_mode_the_dropout_alone(tmp_path):
    """Its batch norms take the running statistics, also of a net in training mode; its Dropout stays at work."""
    sample = write_today(tmp_path, "training", net().train())
    answer = OnnxSession(sample.path, hints=said(*SAID))(sample.images)
    np.testing.assert_allclose(softmax64(answer), sample.probabilities, atol=1e-4)
    dropping = write_today(tmp_path, "dropping", net(torch.nn.Dropout(0.5)).train())
    with pytest.raises(
        Refusal, match=r"different answers to the same images, as Dropout in training mode does; call net\.eval"
    ):
        OnnxSession(dropping.path)


@pytest.mark.slow
def test_weights_of_todays_exporter_are_read_wherever_one_stands(tmp_path, monkeypatch):
    """The exporter writes NAME.onnx.data; another net's file of that name lies in the working directory."""
    folders = [tmp_path / "mine", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
    mine, theirs = (write_today(folder, "net", net(seed=seed)) for seed, folder in enumerate(folders))
    assert (folders[0] / "net.onnx.data").exists()
    monkeypatch.chdir(folders[1])
    runtime = OnnxSession(mine.path, hints=said(*SAID))
    np.testing.assert_allclose(softmax64(runtime(mine.images)), mine.probabilities, atol=1e-4)
    assert np.abs(mine.probabilities - theirs.probabilities).max() > 0.1


@pytest.mark.slow
def test_labels_and_preprocessing_of_timm_are_its_own(tmp_path):
    """What its tools write says all but that the answers are logits."""
    model = OnnxSession(SHEET["timm"](tmp_path).path).model
    assert model.spec.labels == tuple(f"name {index}" for index in range(10))
    assert (model.reading.mean, model.reading.std, model.reading.resize) == ((0.5,) * 3, (0.5,) * 3, 168)
    assert model.reading.assumed == ["channels", "scores"]


def softmax64(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_a_net_that_looks_at_its_batch_in_other_ways_is_refused(tmp_path):
    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            y = self.body(x)
            return y - y.mean(0, keepdim=True)

    sample = write(tmp_path, "centred", Centred())
    with pytest.raises(Refusal, match="differently alone and among others"):
        OnnxSession(sample.path)


def test_weights_beside_the_file_are_its_own_wherever_one_stands(tmp_path, monkeypatch):
    """Another file of the same name in the working directory is left alone."""
    sample, elsewhere = SHEET["external data"](tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = write(elsewhere, "external", net(seed=2))
    split(other.path)
    monkeypatch.chdir(elsewhere)
    mine, theirs = (OnnxSession(one.path, hints=said(*SAID)) for one in (sample, other))
    assert mine(sample.images).argmax(1).tolist() == sample.probabilities.argmax(1).tolist()
    assert not np.allclose(mine(sample.images), theirs(sample.images))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(OnnxSession(other.path, hints=said(*SAID))(sample.images), theirs(sample.images))


def test_the_digest_covers_the_weights_and_a_reload_sees_them_change(tmp_path, encode):
    sample = SHEET["external data"](tmp_path)
    other = write(tmp_path, "other", net(seed=2))
    split(other.path)
    config = parse(ServeConfig, argv=[str(sample.path)])
    before = load(config)[0]
    shutil.copy(tmp_path / "other.onnx.data", tmp_path / "external.onnx.data")
    after = load(config)[0]
    assert before.model.digest != after.model.digest
    assert np.array_equal(after(sample.images), OnnxSession(other.path)(sample.images))


def test_all_files_of_a_model_travel_to_replicas(tmp_path):
    path = SHEET["external data"](tmp_path).path
    (tmp_path / "external.onnx.json").write_text('{"resize": 40}')
    (tmp_path / "other.json").write_text("{}")
    assert read_artefact(path).keys() == {"external.onnx", "external.onnx.data", "external.onnx.json"}


@pytest.mark.parametrize("name", ["../weights", "/etc/hostname", "link"])
def test_no_weight_file_lies_outside_the_models_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    sample = SHEET["external data"](folder)
    shutil.move(folder / "external.onnx.data", tmp_path / "weights")
    os.symlink(tmp_path / "weights", folder / "link")
    model = onnx.load(sample.path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = name if entry.key == "location" else entry.value
    sample.path.write_bytes(model.SerializeToString())
    with pytest.raises(Refusal, match="which is outside its folder"):
        OnnxSession(sample.path)


def test_of_two_outputs_that_may_be_the_classes_the_user_chooses(tmp_path):
    class Heads(Two):
        def forward(self, x):
            y = self.body(x)
            return y, -y

    sample = write(tmp_path, "heads", Heads(net()))
    with pytest.raises(Refusal, match=r"has the outputs .*; choose the one that holds the classes with --output NAME"):
        OnnxSession(sample.path)
    first, second = (output.name for output in onnx.load(sample.path).graph.output)
    one, other = (OnnxSession(sample.path, hints=said("--output", name)) for name in (first, second))
    assert np.array_equal(one(sample.images), -other(sample.images))
    with pytest.raises(Refusal, match="has no output third; choose one of"):
        OnnxSession(sample.path, hints=said("--output", "third"))
