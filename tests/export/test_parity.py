import json

import numpy as np
import onnx
import pytest

from common.cli import run_command
from common.files import sha256
from common.refusal import Refusal
from export import parity
from export import to_onnx as to_onnx_command
from export.compare import TOLERANCES, compare
from export.graphs.graph import to_onnx
from export.pairs import ParityRow
from fold import run as fold
from fold.image_sets import EXTREMES
from fold.plain import load_plain, save_plain
from train import run as train


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A trained, folded and exported net on disk, made by the commands."""
    folder = tmp_path_factory.mktemp("road")
    argv = "--depth 10 --width 0.25 --epochs 1 --out".split()
    assert run_command(train.command, train.TrainConfig, argv=[*argv, str(folder)]) == 0
    assert run_command(fold.command, fold.FoldConfig, argv=[str(folder / "checkpoint.pt")]) == 0
    assert (
        run_command(to_onnx_command.command, to_onnx_command.ToOnnxConfig, argv=[str(folder / "plain.safetensors")])
        == 0
    )
    return folder


def refuse(*_, **__):
    raise Refusal("it is elsewhere")


def run(*argv):
    return run_command(parity.command, parity.ParityConfig, argv=[str(part) for part in argv])


def test_all_forms_agree_on_real_and_random_images(road, capsys):
    against = [road / "checkpoint.pt", road / "plain.safetensors"]
    assert run(road / "plain.onnx", "--against", *against, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["parity"]
    assert report["training"]["command"].startswith("python train/run.py --depth 10 --width 0.25 --epochs 1 --out")
    assert report["fold"]["logits"][0]["precision"] == "float64"
    kinds = [("real", 359)] * 2 + [("random", 64)] * 2 + [("extreme", 5)] * 2
    assert [(row["images"], row["num_images"]) for row in rows] == kinds
    assert all(row["within_tolerance"] and row["top1_agreement"] == 1 for row in rows)
    assert {row["worst"] for row in rows if row["images"] == "extreme"} <= set(EXTREMES)
    files = [road / "plain.onnx", *against]
    assert report["artefacts"] == {str(path): sha256(path.read_bytes()) for path in files}
    written = road / "report.json"
    assert run(road / "plain.onnx", "--against", *against, "--report", written) == 0
    assert json.loads(written.read_text()) == report


@pytest.mark.slow
def test_layers_are_shown_drawn_and_reported(road, tmp_path, capsys):
    plot, report = tmp_path / "layers.png", tmp_path / "report.json"
    argv = [road / "plain.onnx", "--against", road / "checkpoint.pt", "--plot", plot, "--report", report]
    assert run(*argv) == 0
    assert "plain.onnx against " in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    (comparison,) = json.loads(report.read_text())["layers"]
    assert comparison["first_beyond_tolerance"] is None
    assert [row["name"] for row in comparison["layers"]][:2] == ["stem.conv", "group0.block0.conv"]
    assert all(row["within_tolerance"] and row["error"] < 1e-5 for row in comparison["layers"])


def test_the_first_layer_beyond_tolerance_is_named(road, tmp_path, capsys):
    plain = load_plain(road / "plain.safetensors")
    plain.net.graph["group1.block0.conv"].tensors["bias"].add_(0.1)
    save_plain(tmp_path / "bent.safetensors", plain.net, plain.spec, plain.provenance)
    assert run(tmp_path / "bent.safetensors", "--against", road / "checkpoint.pt", "--layers") == 1
    assert "the first layer beyond tolerance is group1.block0.conv" in capsys.readouterr().out


def test_the_more_precise_form_is_the_reference_whichever_is_named_first(road, tmp_path, capsys):
    half = tmp_path / "half.onnx"
    plain = load_plain(road / "plain.safetensors")
    half.write_bytes(to_onnx(plain.net, plain.spec, plain.provenance, precision="fp16").SerializeToString())
    for argv in ((half, "--against", road / "checkpoint.pt"), (road / "checkpoint.pt", "--against", half)):
        assert run(*argv, "--json") == 0
        for row in json.loads(capsys.readouterr().out)["parity"]:
            assert (row["reference"], row["candidate"]) == (str(road / "checkpoint.pt"), str(half))
            assert row["tolerance"] == {"largest": 0.01, "agreement": 1.0}
            assert 1e-5 < row["relative"] < 0.01


def test_providers_are_compared_one_by_one_and_missing_ones_named(road, capsys, monkeypatch):
    monkeypatch.setattr("export.artefacts.loadable_providers", lambda: ("CPUExecutionProvider",))
    argv = [road / "plain.onnx", "--against", road / "checkpoint.pt", "--json", "--providers", "tensorrt", "cpu"]
    assert run(*argv) == 0
    output = capsys.readouterr()
    assert "tensorrt is not compared: ONNX Runtime's TensorrtExecutionProvider does not load here\n" in output.err
    candidates = {row["candidate"] for row in json.loads(output.out)["parity"]}
    assert candidates == {f"{road / 'plain.onnx'} on cpu"}
    assert run(*argv[:3], "--providers", "tensorrt", "cuda") == 2
    assert "CUDAExecutionProvider does not load here" in capsys.readouterr().err
    assert run(road / "checkpoint.pt", "--against", road / "plain.onnx", "--providers", "cpu") == 2
    assert "--providers are for .onnx files, and" in capsys.readouterr().err


def test_mnn_is_compared_like_a_provider(road, capsys, monkeypatch):
    argv = [road / "plain.onnx", "--against", road / "checkpoint.pt", "--providers", "mnn"]
    assert run(*argv, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["parity"]
    assert {row["candidate"] for row in rows} == {f"{road / 'plain.onnx'} on mnn"}
    assert run(*argv, "--layers") == 2
    assert "MNN and PyTorch show no layers; leave --layers and --plot out" in capsys.readouterr().err
    monkeypatch.setattr("export.runtimes.mnn_module.find_spec", lambda name: None)
    assert run(*argv) == 2
    assert "mnn is not compared: MNN is not installed here" in capsys.readouterr().err


def test_eight_bits_are_judged_by_real_images_alone(road, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("export.model_file.onnx_reader.OnnxGraph.precision", "int8")
    assert run(road / "plain.onnx", "--against", road / "checkpoint.pt", "--json") == 0
    verdicts = {row["images"]: row["within_tolerance"] for row in json.loads(capsys.readouterr().out)["parity"]}
    assert verdicts == {"real": True, "random": None, "extreme": None}
    monkeypatch.setattr("train.data.datasets.load", refuse)
    assert run(road / "plain.onnx", "--against", road / "checkpoint.pt") == 2
    assert "int8 can only be judged on real images, and there are none: it is elsewhere" in capsys.readouterr().err


def test_without_real_images_floats_are_judged_on_the_others(road, capsys, monkeypatch):
    monkeypatch.setattr("train.data.datasets.load", refuse)
    assert run(road / "plain.onnx", "--against", road / "checkpoint.pt") == 0
    output = capsys.readouterr().out
    assert "no real images, parity is on random and extreme ones alone: it is elsewhere" in output
    assert "359 real" not in output


def test_nan_on_any_images_is_a_verdict_in_every_precision():
    broken = np.full((2, 3), np.nan)
    comparison = compare(("a", np.ones((2, 3))), ("b", broken), tolerance=TOLERANCES["int8"])
    assert ParityRow("extreme", comparison).verdict is False


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
    assert (
        run_command(to_onnx_command.command, to_onnx_command.ToOnnxConfig, argv=[str(road / "plain.safetensors")]) == 0
    )
    assert (road / "plain.onnx").read_bytes() == before


def test_what_is_no_plain_net_is_not_exported(road, capsys):
    assert run_command(to_onnx_command.command, to_onnx_command.ToOnnxConfig, argv=[str(road / "checkpoint.pt")]) == 2
    assert "is not a valid safetensors file" in capsys.readouterr().err


def test_a_damaged_and_a_missing_onnx_are_refused_in_one_line(road, tmp_path, capsys):
    damaged = tmp_path / "cut.onnx"
    damaged.write_bytes((road / "plain.onnx").read_bytes()[:5000])
    for path, message in (
        (damaged, "is not a valid ONNX file: its encoding is damaged;"),
        (tmp_path / "missing.onnx", "No such file"),
    ):
        assert run(path, "--against", road / "plain.safetensors") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
