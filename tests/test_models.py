"""The model that comes along is whole, small, what its card says, and served when none is named."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from serving import read_greeting

from common.image import decode
from export.runtimes.cascade import read_forms
from export.runtimes.onnx_session import OnnxSession
from serve.model.choose import why_unfit

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
CARD = json.loads((MODELS / "fashion-mnist.json").read_text())
HELD_OUT = sorted((MODELS / "held-out").glob("*.png"))


def test_the_card_is_the_record_inside_the_file():
    path = MODELS / "fashion-mnist.onnx"
    assert path.stat().st_size <= 3_000_000
    model = OnnxSession(path).model
    assert model.name == CARD["model"]
    assert {key: CARD[key] for key in model.provenance} == model.provenance
    assert len(model.spec.labels) == 10


def test_the_int8_form_is_of_the_same_net_and_costs_what_the_readme_says():
    path = MODELS / "fashion-mnist-int8.onnx"
    assert path.stat().st_size <= 1_000_000
    form, net = OnnxSession(path).model, OnnxSession(MODELS / "fashion-mnist.onnx").model
    export = form.provenance["export"]
    assert form.spec == net.spec
    assert export["plain_sha256"] == net.provenance["export"]["plain_sha256"]
    assert why_unfit(export) is None
    test, text = export["test"], (MODELS / "README.md").read_text()
    assert f"| {100 * test['accuracy']:.2f} %, the same class as fp32 on {100 * test['top1_agreement']:.2f} %" in text
    assert test["num_images"] == 10_000


def test_the_cascade_is_worth_what_the_readmes_say():
    evidence = read_forms(sorted(MODELS.glob("*.onnx"))).evidence
    share, bound = f"{100 * evidence.share_escalated:.1f} %", f"at most {100 * evidence.changed_at_most:.2g} %"
    for path, said in (
        (MODELS / "README.md", f"{share} of 10,000 test images go on to fp32; {evidence.num_changed} classes differ"),
        (ROOT / "README.md", f"| {share}, {evidence.num_changed} of 10,000; with 95 % certainty {bound} (int8 alone: "),
        (ROOT / "docs" / "eight-bits.md", f"| {evidence.num_escalated}, {share} |"),
        (ROOT / "docs" / "eight-bits.md", f"| {evidence.num_changed_alone}, {evidence.num_changed} |"),
        (ROOT / "docs" / "eight-bits.md", f"images | {evidence.threshold:.3g} |"),
    ):
        assert said in path.read_text()


def test_the_card_says_how_it_was_made_and_that_nothing_changed():
    training = CARD["training"]
    assert training["command"].startswith("python train/run.py --dataset fashion-mnist")
    assert training["epochs_done"] == training["epochs"]
    assert training["test_accuracy"] > 0.93
    assert all(row["relative"] < 1e-12 for row in CARD["fold"]["logits"] if row["precision"] == "float64")
    assert all(row["within_tolerance"] and row["top1_agreement"] == 1 for row in CARD["parity"])
    assert {row["images"] for row in CARD["parity"]} >= {"random", "real"}


def test_the_models_readme_has_the_cards_figures():
    text = (MODELS / "README.md").read_text()
    assert f"`{CARD['training']['command']}`" in text
    assert f"{100 * CARD['training']['test_accuracy']:.2f} %" in text
    assert f"{CARD['fold']['dirac_parameters']:,}" in text


@pytest.mark.parametrize("name", ["fashion-mnist.onnx", "fashion-mnist-int8.onnx"])
def test_the_held_out_images_are_recognised(name):
    model = OnnxSession(MODELS / name)
    images = np.stack([decode(path.read_bytes(), model.model.spec.image) for path in HELD_OUT])
    answers = [model.model.spec.labels[index].replace("/", "-") for index in model(images).argmax(1)]
    truth = [path.stem.rpartition("_")[0] for path in HELD_OUT]
    assert len(truth) == 10
    assert sum(map(str.__eq__, answers, truth)) >= 9


@pytest.mark.slow
def test_a_server_without_a_model_serves_it(tmp_path):
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "serve" / "run.py"), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        read_greeting(server)
        assert server.greeting.startswith(CARD["model"])
        image = {"content": HELD_OUT[0].read_bytes(), "headers": {"Content-Type": "image/png"}}
        response = httpx.post(f"{server.url}/predict", timeout=60, **image)
        assert response.json()["results"][0]["label"] == HELD_OUT[0].stem.rpartition("_")[0].replace(
            "T-shirt-", "T-shirt/"
        )
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_the_files_without_their_temperature_are_those_that_were_exported():
    """Only metadata was added: what parity and int8 measured of the graphs holds."""
    for name in ("fashion-mnist.onnx", "fashion-mnist-int8.onnx"):
        model = onnx.load(MODELS / name)
        for entry in model.metadata_props:
            said = json.loads(entry.value)
            if entry.key == "spec":
                del said["temperature"]
            else:
                before = said["training"].pop("calibration")["sha256_before"]
            entry.value = json.dumps(said)
        assert hashlib.sha256(model.SerializeToString()).hexdigest() == before
        if name == "fashion-mnist.onnx":
            assert {before, OnnxSession(MODELS / name).model.digest} <= set(CARD["artefacts"].values())


def test_the_temperature_is_that_of_the_record_and_of_the_readme():
    calibration, spec = CARD["training"]["calibration"], OnnxSession(MODELS / "fashion-mnist.onnx").model.spec
    assert calibration["temperature"] == spec.temperature
    value = f"{spec.temperature:.3f} ± {calibration['standard_error']:.3f}"
    assert f"| {value}, fitted on the {calibration['images']:,} training images" in (MODELS / "README.md").read_text()
