import json

import numpy as np
import onnx
import pytest

from export import parity, to_onnx
from fold import run as fold
from train import run as train
from train.cli import run_command


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A trained, folded and exported net on disk, made by the commands."""
    folder = tmp_path_factory.mktemp("road")
    argv = "--depth 10 --width 0.25 --epochs 1 --out".split()
    assert run_command(train.command, train.TrainConfig, argv=[*argv, str(folder)]) == 0
    assert run_command(fold.command, fold.FoldConfig, argv=[str(folder / "checkpoint.pt")]) == 0
    assert run_command(to_onnx.command, to_onnx.ToOnnxConfig, argv=[str(folder / "plain.safetensors")]) == 0
    return folder


def run(*argv):
    return run_command(parity.command, parity.ParityConfig, argv=[str(part) for part in argv])


def test_all_forms_agree_on_real_and_random_images(road, capsys):
    against = [road / "checkpoint.pt", road / "plain.safetensors"]
    assert run(road / "plain.onnx", "--against", *against, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["parity"]
    assert report["training"]["command"].startswith("python train/run.py --depth 10 --width 0.25 --epochs 1 --out")
    assert report["fold"]["logits"][0]["precision"] == "float64"
    assert [(row["images"], row["num_images"]) for row in rows] == [("random", 64)] * 2 + [("real", 359)] * 2
    assert all(row["within_tolerance"] and row["top1_agreement"] == 1 for row in rows)
    written = road / "report.json"
    assert run(road / "plain.onnx", "--against", *against, "--report", written) == 0
    assert json.loads(written.read_text()) == report


def test_a_form_that_differs_ends_in_status_one(road, tmp_path, capsys):
    model = onnx.load(road / "plain.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.bias")
    values = np.frombuffer(bias.raw_data, np.float32) + 0.01
    bias.raw_data = values.tobytes()
    onnx.save(model, tmp_path / "bent.onnx")
    assert run(tmp_path / "bent.onnx", "--against", road / "checkpoint.pt") == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_another_model_and_nothing_to_compare_with_are_refused(road, write_onnx, capsys):
    assert run(road / "plain.onnx") == 2
    assert "name what to compare with" in capsys.readouterr().err
    _, other = write_onnx()
    assert run(road / "plain.onnx", "--against", other) == 2
    assert "is another model than" in capsys.readouterr().err


def test_a_second_export_writes_the_same_bytes(road):
    before = (road / "plain.onnx").read_bytes()
    assert run_command(to_onnx.command, to_onnx.ToOnnxConfig, argv=[str(road / "plain.safetensors")]) == 0
    assert (road / "plain.onnx").read_bytes() == before


def test_what_is_no_plain_net_is_not_exported(road, capsys):
    assert run_command(to_onnx.command, to_onnx.ToOnnxConfig, argv=[str(road / "checkpoint.pt")]) == 2
    assert "is no safetensors file" in capsys.readouterr().err
