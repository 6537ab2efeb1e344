import json
from dataclasses import asdict

import numpy as np
import pytest
from foreign import MEAN, SAID, SHEET, STD

from common.cli import run_command
from export import describe, parity, to_triton, to_trt
from export.model_file.engine_card import read_card
from export.runtimes.onnx_session import OnnxSession


def run(module, config, *argv):
    return run_command(module.command, config, argv=[str(word) for word in argv])


def run_describe(*argv):
    return run(describe, describe.DescribeConfig, *argv)


@pytest.fixture
def sample(tmp_path):
    return SHEET["plain"](tmp_path)


def test_what_is_said_once_is_read_by_every_command(sample, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("".join(f"name {i}\n" for i in range(10)))
    assert run_describe(sample.path, *SAID, "--labels", tmp_path / "names.txt", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["mean"], printed["labels"][9]) == (list(MEAN), "name 9")
    model = OnnxSession(sample.path).model
    assert (model.reading.mean, model.reading.std, model.spec.labels[9]) == (MEAN, STD, "name 9")
    assert run(to_trt, to_trt.ToTrtConfig, sample.path) == 0
    card = read_card(sample.path.with_suffix(".engine"))
    assert asdict(card.signature.reading) == asdict(model.reading)
    assert (card.spec, card.onnx_sha256) == (model.spec, model.digest)
    assert run(to_triton, to_triton.ToTritonConfig, sample.path, "--out", tmp_path / "repository") == 0
    assert (tmp_path / "repository/plain/labels.txt").read_text() == (tmp_path / "names.txt").read_text()


def test_a_second_description_changes_what_it_says_and_keeps_the_rest(sample):
    assert run_describe(sample.path, *SAID) == 0
    assert run_describe(sample.path, "--resize", "40", "--probabilities") == 0
    reading = OnnxSession(sample.path).model.reading
    assert (reading.mean, reading.resize, reading.scores) == (MEAN, 40, "probabilities")


def test_nothing_is_written_where_nothing_is_said_or_what_is_said_does_not_fit(sample, capsys):
    assert run_describe(sample.path) == 0
    assert "assumed: mean 0 0 0" in " ".join(capsys.readouterr().out.split())
    assert run_describe(sample.path, "--mean", "0.5") == 2
    assert "mean needs a value for each channel, 3 in all" in capsys.readouterr().err
    assert run_describe(sample.path, "--logits", "--probabilities") == 2
    assert "exclude each other" in capsys.readouterr().err
    assert list(sample.path.parent.glob("*.json")) == []


def test_parity_reads_both_files_as_it_is_told(sample, tmp_path, capsys):
    other = SHEET["external data"](tmp_path)
    report = tmp_path / "report.json"
    argv = (sample.path, "--against", other.path, *SAID, "--report", report)
    assert run(parity, parity.ParityConfig, *argv) == 0
    rows = json.loads(report.read_text())["parity"]
    assert all(row["within_tolerance"] for row in rows)
    assert np.isfinite([row["relative"] for row in rows]).all()


@pytest.mark.parametrize(("name", "dims"), [("not flattened", "[10, 1, 1]"), ("two outputs", "[10]")])
def test_outputs_that_are_served_are_built_and_written_for_triton(name, dims, tmp_path):
    path = SHEET[name](tmp_path).path
    assert run(to_trt, to_trt.ToTrtConfig, path) == 0
    card = read_card(path.with_suffix(".engine"))
    assert len(card.spec.labels) == 10
    assert run(to_triton, to_triton.ToTritonConfig, path, "--out", tmp_path / "repository") == 0
    (config,) = (tmp_path / "repository").glob("*/config.pbtxt")
    assert f"dims: {dims}\n" in config.read_text()
