"""Commands that write and use a cascade, on a net trained for two epochs on digits."""

import csv
import json
import shutil

import numpy as np
import onnx
import pytest
from cascades import change
from PIL import Image

from common.cli import run_command
from export import cascade, evaluate, predict, to_onnx
from export.eight_bits.escalation import images_to_choose_by
from export.runtimes.onnx_session import OnnxSession
from fold import run as fold
from train import run as train
from train.data import datasets

pytestmark = pytest.mark.slow


def run(module, config, *argv):
    return run_command(module.command, config, argv=[*map(str, argv)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(plain.onnx, plain-int8.onnx)"""
    folder = tmp_path_factory.mktemp("run")
    argv = ("--depth", 10, "--width", 0.5, "--epochs", 2, "--out", folder)
    assert run(train, train.TrainConfig, *argv) == 0
    assert run(fold, fold.FoldConfig, folder / "checkpoint.pt") == 0
    plain, quick = folder / "plain.safetensors", folder / "plain-int8.onnx"
    assert run(to_onnx, to_onnx.ToOnnxConfig, plain) == 0
    options = ("--precision", "int8", "--calibration-images", 64, "--allow-drop", "--out", quick)
    assert run(to_onnx, to_onnx.ToOnnxConfig, plain, *options) == 0
    return folder / "plain.onnx", quick


@pytest.fixture
def forms(written, tmp_path):
    """Copies, beside the record of the run."""
    folder = tmp_path / "run"
    shutil.copytree(written[0].parent, folder)
    return tuple(folder / path.name for path in written)


def recorded(path):
    return OnnxSession(path).model.provenance["export"].get("cascade")


def test_the_export_measures_on_images_that_chose_and_judges_on_the_test_images(written):
    exact, quick = map(OnnxSession, written)
    digits = datasets.load_as_trained(quick.model.provenance["training"])
    assert len(digits.validation)
    chosen_by = np.concatenate([part.images for part in images_to_choose_by(digits, 64)])
    errors = quick(chosen_by).astype(np.float64) - exact(chosen_by)
    threshold = max(
        error[int(np.argmax(row))] - min(error) for error, row in zip(errors, quick(chosen_by), strict=True)
    )
    logits, reference = quick(digits.test.images), exact(digits.test.images)
    leads = [a - b for *_, b, a in map(sorted, logits.astype(np.float64).tolist())]
    gone_on = np.array(leads) <= threshold
    changed = logits.argmax(1) != reference.argmax(1)
    record = recorded(written[1])
    # float32 sums in another lowering, and in other batches, round differently.
    assert record["threshold"] == pytest.approx(threshold, rel=1e-4)
    assert (record["num_chosen_by"], record["num_test"]) == (len(chosen_by), 359)
    assert record["num_escalated"] == pytest.approx(gone_on.sum(), abs=1)
    assert record["num_changed"] == sum(changed & ~gone_on)
    assert record["num_changed_alone"] == sum(changed)
    assert record["share_escalated"] == record["num_escalated"] / 359
    assert recorded(written[0]) is None


def test_a_file_that_was_written_before_gets_the_same_record_and_keeps_its_graph(forms, capsys):
    exact, quick = forms
    before, graph = recorded(quick), onnx.load(quick).graph.SerializeToString(deterministic=True)
    change(quick, lambda export: {name: value for name, value in export.items() if name != "cascade"})
    argv = (quick, "photos", "--cascade", exact)
    assert run(predict, predict.PredictConfig, *argv) == 2
    assert f"measure it with python export/cascade.py {exact} {quick}" in capsys.readouterr().err
    assert run(cascade, cascade.CascadeConfig, quick, exact, "--json") == 0
    printed, after = json.loads(capsys.readouterr().out), recorded(quick)
    assert printed == after
    assert after.pop("threshold") == pytest.approx(before.pop("threshold"), rel=1e-4)
    assert after.pop("num_escalated") == pytest.approx(before.pop("num_escalated"), abs=1)
    assert after.pop("share_escalated") == pytest.approx(before.pop("share_escalated"), abs=1 / 359)
    assert after == before
    assert onnx.load(quick).graph.SerializeToString(deterministic=True) == graph


def test_a_reference_for_the_server_stays_in_the_file(forms, tmp_path, capsys):
    exact, quick = forms
    argv = (quick, "--store-reference", "--out", tmp_path / "report")
    assert run(evaluate, evaluate.EvaluateConfig, *argv, "--cascade", exact) == 2
    assert "--store-reference is for one file" in capsys.readouterr().err
    assert run(evaluate, evaluate.EvaluateConfig, *argv) == 0
    before = OnnxSession(quick).model.provenance["reference"]
    assert run(cascade, cascade.CascadeConfig, exact, quick) == 0
    assert OnnxSession(quick).model.provenance["reference"] == before
    written = {entry.key: entry.value for entry in onnx.load(quick).metadata_props}
    assert "reference" in written
    assert "reference" not in json.loads(written["provenance"])


def test_what_cannot_be_measured_is_refused_and_nothing_is_written(forms, capsys):
    exact, quick = forms
    change(quick, lambda export: {**export, "calibration": {"images": 10**9}})
    content = quick.read_bytes()
    assert run(cascade, cascade.CascadeConfig, exact, quick) == 2
    assert "does not record how many images set its ranges" in capsys.readouterr().err
    assert run(cascade, cascade.CascadeConfig, exact, exact) == 2
    assert "is fp32; export both" in capsys.readouterr().err
    assert quick.read_bytes() == content


def test_evaluate_judges_both_files_as_one(written, tmp_path, capsys):
    exact, quick = written
    reports = []
    for argv in ((exact,), (exact, "--cascade", quick)):
        assert run(evaluate, evaluate.EvaluateConfig, *argv, "--out", tmp_path / "report") == 0
        reports.append(json.loads((tmp_path / "report" / "report.json").read_text()))
    assert f"{recorded(quick)['num_escalated']} of 359 images" in capsys.readouterr().out
    assert reports[1]["model"]["file"] == "plain-int8.onnx and plain.onnx"
    assert reports[1]["images"] == reports[0]["images"]
    if not recorded(quick)["num_changed"]:
        assert reports[1]["confusion"] == reports[0]["confusion"]


def test_predict_gives_each_image_the_answer_of_the_form_that_is_sure(written, tmp_path, capsys):
    exact, quick = map(OnnxSession, written)
    images = datasets.load("digits").test.images[:40]
    (tmp_path / "photos").mkdir()
    for index, pixels in enumerate(images):
        Image.fromarray(pixels[:, :, 0]).save(tmp_path / "photos" / f"{index:02}.png")
    argv = (written[1], tmp_path / "photos", "--cascade", written[0], "--out", tmp_path / "out.csv")
    assert run(predict, predict.PredictConfig, *argv) == 0
    leads = [a - b for *_, b, a in map(sorted, quick(images).astype(np.float64).tolist())]
    gone_on = np.array(leads) <= recorded(written[1])["threshold"]
    assert f"{sum(gone_on)} of 40 images" in capsys.readouterr().out
    expected = np.where(gone_on[:, None], exact(images), quick(images)).argmax(1)
    with open(tmp_path / "out.csv") as file:
        assert [int(row["index"]) for row in csv.DictReader(file)] == expected.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cascade", "{quick}", "--mean", "0.5"), "leave --mean out"),
        (("--cascade", "{exact}"), "is fp32; export both"),
        (("--cascade", "missing.onnx"), "No such file"),
        (("--cascade", "plain.engine"), "plain.engine is not an .onnx file"),
    ],
)
def test_what_is_no_cascade_is_refused_in_one_line(written, capsys, options, message):
    exact, quick = written
    options = [option.format(exact=exact, quick=quick) for option in options]
    assert run(evaluate, evaluate.EvaluateConfig, exact, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
