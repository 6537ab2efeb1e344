"""--flips: an image and its mirror image answered together."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.cli import run_command
from common.refusal import Refusal
from export.artefacts import open_artefact
from export.evaluate import EvaluateConfig
from export.evaluate import command as evaluate
from export.evaluation.answering import mirrored
from export.graphs.graph import to_onnx
from export.predict import PredictConfig
from export.predict import command as predict
from export.runtimes.cascade import Cascade
from export.runtimes.runtime import probabilities
from fold.graph import fold


@pytest.fixture
def write(tmp_path, make_net, make_spec):
    """A plain.onnx whose training says this of itself."""

    def of(training):
        model = to_onnx(fold(make_net()), make_spec(), {"training": training})
        (tmp_path / "plain.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "plain.onnx"

    return of


def test_logits_are_the_mean_of_an_images_and_its_mirror_images(write, images):
    form, pixels = open_artefact(write({})), images(5)
    left, right = form.answer(pixels), form.answer(np.flip(pixels, axis=2).copy())
    assert np.abs(left - right).max() > 0.01
    np.testing.assert_allclose(mirrored(form).answer(pixels), (left + right) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("training", "allowed"),
    [
        ({}, True),
        ({"dataset": "folder"}, True),
        ({"dataset": "fashion-mnist", "flip": "auto"}, True),
        ({"dataset": "digits"}, False),
        ({"dataset": "digits", "flip": "yes"}, True),
        ({"dataset": "folder", "flip": "no"}, False),
        ({"dataset": "somebody else's"}, True),
    ],
)
def test_labels_that_mirroring_changes_are_refused_where_training_says_so(write, training, allowed):
    form = open_artefact(write(training))
    if allowed:
        mirrored(form)
    else:
        with pytest.raises(Refusal, match=r"was not trained on mirror images, .*leave --flips out"):
            mirrored(form)


def test_predict_and_evaluate_take_flips(write, images, tmp_path, capsys):
    path, pixels = write({}), images(10)
    for label in range(10):
        (tmp_path / "photos" / f"label {label}").mkdir(parents=True)
        Image.fromarray(pixels[label]).save(tmp_path / "photos" / f"label {label}" / "a.png")
    form = open_artefact(path)
    expected = probabilities((form.answer(pixels) + form.answer(np.flip(pixels, axis=2).copy())) / 2)
    out = tmp_path / "predictions.csv"
    argv = [str(path), str(tmp_path / "photos"), "--flips", "--out", str(out)]
    assert run_command(predict, PredictConfig, argv=argv) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [int(row["index"]) for row in rows] == expected.argmax(1).tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], expected.max(1), rtol=1e-5)
    argv = [str(path), "--data-dir", str(tmp_path / "photos"), "--flips", "--out", str(tmp_path / "report")]
    assert run_command(evaluate, EvaluateConfig, argv=argv) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["top1"]["hits"] == int((expected.argmax(1) == np.arange(10)).sum())
    assert "each with its mirror image" in capsys.readouterr().out


def test_a_cascade_is_refused(write):
    form = replace(open_artefact(write({})), answer=object.__new__(Cascade))
    with pytest.raises(Refusal, match="leave --flips or --cascade out"):
        mirrored(form)


def test_a_reference_for_the_server_is_not_counted_with_mirror_images(tmp_path, capsys):
    argv = [str(tmp_path / "plain.onnx"), "--flips", "--store-reference"]
    assert run_command(evaluate, EvaluateConfig, argv=argv) == 2
    assert "which mirrors no image: leave out --flips" in capsys.readouterr().err
