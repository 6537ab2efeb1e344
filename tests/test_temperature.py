"""One temperature down the whole road: fitted at the end of training, kept by every file, in every answer."""

import hashlib
import io
import json
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import reference
import torch
from PIL import Image
from scipy.optimize import brentq
from starlette.testclient import TestClient

from common.cli import run_command
from export import describe, evaluate, fit_temperature, parity, predict, to_onnx, to_triton, to_trt
from export.artefacts import open_artefact
from export.metadata import store_reference
from export.model_file.engine_card import read_card
from export.model_file.onnx_reader import read_header
from export.model_file.reference import KEY
from export.runtimes.onnx_session import OnnxSession
from fold import run as fold
from serve.request.app import make_app
from serve.request.limits import Limits
from train import run as training
from train.checkpoint import load_checkpoint, load_net, save_checkpoint
from train.config import TrainConfig
from train.data import datasets

pytestmark = pytest.mark.slow
CONFIGS = {
    training: TrainConfig,
    fold: fold.FoldConfig,
    to_onnx: to_onnx.ToOnnxConfig,
    to_trt: to_trt.ToTrtConfig,
    to_triton: to_triton.ToTritonConfig,
    parity: parity.ParityConfig,
    predict: predict.PredictConfig,
    evaluate: evaluate.EvaluateConfig,
    describe: describe.DescribeConfig,
    fit_temperature: fit_temperature.FitTemperatureConfig,
}


def run(module, *argv):
    return run_command(module.command, CONFIGS[module], argv=[str(word) for word in argv])


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A run of one epoch with an average of its weights, folded and exported: its folder."""
    folder = tmp_path_factory.mktemp("road")
    small = ("--depth", 10, "--width", 0.25, "--epochs", 1, "--ema", 0.9, "--label-smoothing", 0.3)
    assert run(training, *small, "--out", folder) == 0
    assert run(fold, folder) == 0
    assert run(to_onnx, folder / "plain.safetensors") == 0
    return folder


@pytest.fixture(scope="module")
def old(road, tmp_path_factory):
    """The same run as an earlier version left it, without a temperature; exported in two forms."""
    folder = tmp_path_factory.mktemp("old")
    for name in ("checkpoint.pt", "best.pt"):
        state = load_checkpoint(road / name)
        save_checkpoint(folder / name, replace(state, spec=replace(state.spec, temperature=1.0), calibration={}))
    assert run(fold, folder) == 0
    assert run(to_onnx, folder / "plain.safetensors") == 0
    assert run(to_onnx, folder / "plain.safetensors", "--precision", "fp16", "--out", folder / "half.onnx") == 0
    return folder


def held_out_logits(state):
    held = datasets.load_as_trained(state.config).validation
    with torch.no_grad():
        return load_net(state)(torch.as_tensor(held.images)).numpy().astype(np.float64), np.asarray(held.targets)


def test_it_is_fitted_on_the_weights_that_are_folded_and_on_the_images_that_were_held_out(road):
    for name in ("checkpoint.pt", "best.pt"):
        state = load_checkpoint(road / name)
        assert state.average
        logits, targets = held_out_logits(state)
        expected = brentq(partial(reference.excess, logits, targets), 0.01, 100, xtol=1e-14)
        assert state.spec.temperature == pytest.approx(expected, rel=1e-4)  # float32 logits in batches of another size
        assert abs(state.spec.temperature - 1) > 0.05
        assert state.calibration["temperature"] == state.spec.temperature
        assert (state.calibration["images"], state.calibration["wrong"]) == (144, (logits.argmax(1) != targets).sum())


def test_every_file_keeps_it_and_no_logit_changes(road, old, tmp_path):
    state = load_checkpoint(road / "best.pt")
    warm = state.spec.temperature
    plain, graph = (open_artefact(road / name) for name in ("plain.safetensors", "plain.onnx"))
    assert [form.spec for form in (plain, graph)] == [state.spec, state.spec]
    assert graph.provenance["training"]["calibration"] == state.calibration
    images = np.asarray(datasets.load("digits").test.images[:20])
    assert (graph.answer(images) == open_artefact(old / "plain.onnx").answer(images)).all()
    assert run(parity, road / "plain.onnx", "--against", road / "best.pt", old / "plain.onnx") == 0
    assert run(to_triton, road / "plain.onnx", "--out", tmp_path / "repository") == 0
    text = (tmp_path / "repository/plain/config.pbtxt").read_text()
    assert f'key: "temperature"\n  value {{\n    string_value: "{warm!r}"' in text
    assert run(to_triton, old / "plain.onnx", "--out", tmp_path / "other") == 0
    assert "temperature" not in (tmp_path / "other/plain/config.pbtxt").read_text()
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")
    assert run(to_trt, road / "plain.onnx", "--out", tmp_path / "plain.engine") == 0
    assert read_card(tmp_path / "plain.engine").spec == state.spec


def test_the_server_and_the_commands_answer_with_it(road, tmp_path, capsys):
    runtime, test = OnnxSession(road / "plain.onnx"), datasets.load("digits").test
    warm = runtime.model.spec.temperature
    image = np.asarray(test.images[3])
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, format="PNG")
    (tmp_path / "3.png").write_bytes(file.getvalue())
    (expected,) = reference.softmax(runtime(image[None]), warm)
    assert abs(expected.max() - reference.softmax(runtime(image[None])).max()) > 1e-3
    with TestClient(make_app(runtime, Limits())) as client:
        answer = client.post("/predict", content=file.getvalue(), headers={"Content-Type": "image/png"}).json()
        assert client.get("/model").json()["temperature"] == warm
        wanted = {
            "inputs": [{"name": "images", "shape": [1, 8, 8, 1], "datatype": "UINT8", "data": image.ravel().tolist()}]
        }
        (tensor,) = client.post("/v2/models/DiracNet-10-0.25/infer", json=wanted).json()["outputs"]
    np.testing.assert_allclose(tensor["data"], runtime(image[None])[0], rtol=1e-6)  # logits stay
    assert answer["results"][0]["probability"] == pytest.approx(expected.max(), rel=1e-6)
    assert run(predict, road / "plain.onnx", tmp_path / "3.png", "--out", tmp_path / "out.json") == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["probability"] == pytest.approx(expected.max(), rel=1e-6)

    capsys.readouterr()
    assert run(evaluate, road / "plain.onnx", "--out", tmp_path / "report") == 0
    printed = " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "report/report.json").read_text())
    logits = runtime(np.asarray(test.images))
    for name, at in (("calibration", warm), ("calibration_without_temperature", 1.0)):
        assert report[name]["mean_confidence"] == pytest.approx(reference.softmax(logits, at).max(1).mean(), rel=1e-5)
    error, plain = (
        100 * report[name]["expected_calibration_error"] for name in ("calibration", "calibration_without_temperature")
    )
    said = f"expected calibration error {error:.2f} % ({plain:.2f} % without the temperature of {warm:.3g})"
    assert said in printed
    assert said.removeprefix("expected calibration error ") in (tmp_path / "report/report.html").read_text()


def test_a_run_that_has_none_gets_it_when_it_is_resumed_and_loses_it_when_it_trains_on(road, old, tmp_path, capsys):
    for name in ("checkpoint.pt", "best.pt"):
        (tmp_path / name).write_bytes((old / name).read_bytes())
    assert run(training, "--resume", "--out", tmp_path, "--json") == 0
    printed, state = json.loads(capsys.readouterr().out), load_checkpoint(road / "best.pt")
    found = load_checkpoint(tmp_path / "best.pt")
    assert (found.spec, found.test_accuracy) == (state.spec, state.test_accuracy)
    assert printed["calibration"] == found.calibration == state.calibration
    assert run(training, "--resume", "--epochs", 3, "--out", tmp_path) == 0
    longer = load_checkpoint(tmp_path / "checkpoint.pt")
    logits, targets = held_out_logits(longer)
    assert (longer.epoch, longer.calibration["wrong"]) == (3, (logits.argmax(1) != targets).sum())
    assert longer.spec.temperature != state.spec.temperature


def test_a_run_without_held_out_images_keeps_1_and_says_so(tmp_path, capsys):
    small = ("--depth", 10, "--width", 0.25, "--epochs", 1, "--validation", 0, "--out", tmp_path)
    assert run(training, *small) == 0
    assert "probabilities have a temperature of 1: 0 images are held out" in " ".join(capsys.readouterr().out.split())
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (state.spec.temperature, state.calibration["images"]) == (1.0, 0)


def test_a_file_gets_it_afterwards_and_without_it_is_bit_for_bit_what_it_was(road, old, tmp_path, capsys):
    files = [tmp_path / name for name in ("plain.onnx", "half.onnx")]
    assert run(parity, old / "plain.onnx", "--against", old / "best.pt", "--report", tmp_path / "plain.json") == 0
    compared = json.loads((tmp_path / "plain.json").read_text())
    capsys.readouterr()
    for file in files:
        file.write_bytes((old / file.name).read_bytes())
    assert run(fit_temperature, *files, "--json") == 0
    fit = json.loads(capsys.readouterr().out)
    assert fit["temperature"] == pytest.approx(load_checkpoint(road / "best.pt").spec.temperature, rel=1e-4)
    for file in files:
        before = (old / file.name).read_bytes()
        header = read_header(file, file.read_bytes())
        assert header.spec.temperature == fit["temperature"]
        digest = hashlib.sha256(before).hexdigest()
        assert header.provenance["training"]["calibration"] == fit | {"sha256_before": digest}
        model = onnx.load(file)
        for entry in model.metadata_props:
            said = json.loads(entry.value)
            del (said if entry.key == "spec" else said["training"])[
                {"spec": "temperature"}.get(entry.key, "calibration")
            ]
            entry.value = json.dumps(said)
        assert model.SerializeToString() == before
    report = json.loads((tmp_path / "plain.json").read_text())  # it is of the new file as well
    assert report["parity"] == compared["parity"]
    assert set(report["artefacts"].values()) == {
        *compared["artefacts"].values(),
        hashlib.sha256(files[0].read_bytes()).hexdigest(),
    }
    assert report["training"] == read_header(files[0], files[0].read_bytes()).provenance["training"]
    assert run(fit_temperature, *files) == 2
    assert "has a temperature of" in capsys.readouterr().err


def test_a_reference_of_other_probabilities_goes(old, tmp_path, capsys):
    file = tmp_path / "plain.onnx"
    file.write_bytes((old / file.name).read_bytes())
    store_reference(file, np.full((20, 10), 0.1), what="twenty")
    assert KEY in read_header(file, file.read_bytes()).metadata
    assert run(fit_temperature, file) == 0
    assert "was of other probabilities: store it again" in " ".join(capsys.readouterr().out.split())
    assert KEY not in read_header(file, file.read_bytes()).metadata


def test_what_cannot_be_fitted_is_refused_and_nothing_is_written(road, old, tmp_path, capsys, make_net, make_spec):
    from export.graphs.graph import to_onnx as graph
    from fold.graph import fold

    fields = {"size": 8, "channels": 1}
    content = graph(fold(make_net(**fields)), make_spec(**fields), {"training": {"dataset": "digits"}})
    (tmp_path / "silent.onnx").write_bytes(content.SerializeToString())
    assert run(fit_temperature, tmp_path / "silent.onnx") == 2
    assert "does not record which images were held out: give --validation" in capsys.readouterr().err
    assert run(fit_temperature, old / "plain.onnx", tmp_path / "silent.onnx") == 2
    assert "were not exported from one plain net" in capsys.readouterr().err
    assert run(fit_temperature, old / "plain.onnx", "--validation", 0.5) == 2
    assert "records that 0.1 was held out; leave --validation out" in capsys.readouterr().err
    assert run(fit_temperature, road / "plain.safetensors") == 2
    assert "name .onnx files; a run gets its temperature by train/run.py --resume" in capsys.readouterr().err
    before = (old / "plain.onnx").read_bytes()
    assert (tmp_path / "silent.onnx").read_bytes() == content.SerializeToString()
    assert (old / "plain.onnx").read_bytes() == before


def test_somebody_elses_net_has_the_one_that_is_said(tmp_path, capsys):
    from foreign import SAID, SHEET

    sample = SHEET["plain"](tmp_path)
    assert run(describe, sample.path, *SAID, "--temperature", 2.5) == 0
    assert OnnxSession(sample.path).model.spec.temperature == 2.5
    Image.fromarray(np.asarray(sample.images[0])).save(tmp_path / "0.png")
    assert run(predict, sample.path, tmp_path / "0.png", "--out", tmp_path / "out.json") == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    warm = sample.probabilities[0] ** (1 / 2.5)
    assert result["probability"] == pytest.approx(warm.max() / warm.sum(), abs=1e-4)
    capsys.readouterr()
    for value in ("0", "nan", "-1", "1e9"):
        assert run(describe, sample.path, "--temperature", value) == 2
        assert "a temperature must be a number from 0.01 to 100" in " ".join(capsys.readouterr().err.split())
    assert run(describe, sample.path, "--temperature", 2, "--probabilities") == 2
    assert "a temperature is for logits; leave --temperature out" in " ".join(capsys.readouterr().err.split())
    assert run(fit_temperature, sample.path) == 2
    assert "is not a file of this project: use export/describe.py --temperature" in " ".join(
        capsys.readouterr().err.split()
    )
    (tmp_path / "plain.onnx.json").write_text('{"temperature": "hot"}')
    assert run(predict, sample.path, tmp_path / "0.png", "--out", tmp_path / "out.json") == 2
    assert "temperature cannot be 'hot'" in " ".join(capsys.readouterr().err.split())
