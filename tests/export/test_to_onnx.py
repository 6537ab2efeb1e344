"""The command, on a net trained for two epochs on digits."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.cli import run_command
from export import to_onnx
from export.eight_bits.quantize import measure_drop, quantize
from export.model_file.probe import probe_images
from export.runtimes.onnx_session import OnnxSession
from export.timing import ROUNDS, Timing, geometric_means, time_answers
from fold import run as fold
from fold.graph import GraphNet
from fold.graph import fold as fold_graph
from fold.lowerings import LOWERINGS
from fold.plain import load_plain, save_plain
from train import run as train
from train.data import datasets
from train.families import build


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    argv = ["--depth", "10", "--width", "0.5", "--epochs", "2", "--out", str(folder)]
    assert run_command(train.command, train.TrainConfig, argv=argv) == 0
    assert run_command(fold.command, fold.FoldConfig, argv=[str(folder / "checkpoint.pt")]) == 0
    return folder / "plain.safetensors"


def run(*argv):
    return run_command(to_onnx.command, to_onnx.ToOnnxConfig, argv=[str(part) for part in argv])


def record_of(path):
    return OnnxSession(path).model.provenance["export"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("spec", lambda text: text.replace('"depth": 10,', '"depth": 1000000000,'), "depth goes up to 1,000"),
        ("spec", lambda text: "[" * 100_000, "the model's spec is not valid JSON: it is nested deeper than 64"),
        ("provenance", lambda text: "[" * 100_000, "is not valid JSON: it is nested deeper than 64"),
        ("provenance", lambda text: "[]", "is not a JSON object; fold the net again"),
    ],
)
def test_a_plain_file_with_damaged_words_is_refused_at_once(plain, tmp_path, capsys, name, change, message):
    with safe_open(plain, "pt") as file:
        metadata = file.metadata()
    changed = change(metadata[name])
    assert changed != metadata[name]
    path = tmp_path / "damaged.safetensors"
    save_file(load_file(plain), path, {**metadata, name: changed})
    assert run(path) == 2
    assert message in capsys.readouterr().err


def test_float32_is_written_as_shared_and_says_so(plain):
    assert run(plain) == 0
    path = plain.with_suffix(".onnx")
    assert record_of(path).items() >= {"precision": "fp32", "lowering": "shared", "opset": 19}.items()
    assert "Min" not in {node.op_type for node in onnx.load(path).graph.node}


def test_a_file_says_what_it_answered_when_it_was_written(plain):
    assert run(plain) == 0
    runtime = OnnxSession(plain.with_suffix(".onnx"))
    probe, spec = record_of(plain.with_suffix(".onnx"))["probe"], runtime.model.spec
    np.testing.assert_allclose(runtime(probe_images(spec.image, probe["seed"])), probe["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_lowering_can_be_asked_for(plain, tmp_path, lowering):
    assert run(plain, "--lowering", lowering, "--out", tmp_path / "net.onnx") == 0
    assert record_of(tmp_path / "net.onnx")["lowering"] == lowering


@pytest.mark.slow
def test_auto_records_the_table_that_it_chose_by(plain, tmp_path, capsys):
    out = tmp_path / "net.onnx"
    assert run(plain, "--lowering", "auto", "--batch-sizes", 1, 4, "--out", out, "--json") == 0
    printed, record = json.loads(capsys.readouterr().out), record_of(out)
    assert printed["lowering"] == record["lowering"] in LOWERINGS
    assert [(row["name"], row["batch_size"]) for row in record["timings"]] == [
        (lowering, size) for size in (1, 4) for lowering in LOWERINGS
    ]
    assert all(0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in record["timings"])
    assert record["timed_on"].startswith("ONNX Runtime ")


def test_the_fastest_is_so_over_all_batch_sizes():
    times = {"steady": (2.0, 2.0), "small": (1.0, 6.0), "large": (5.0, 1.0)}
    rows = [
        Timing(name, size, ms, ms, ms) for name, pair in times.items() for size, ms in zip((1, 8), pair, strict=True)
    ]
    assert next(iter(geometric_means(rows))) == "steady"
    assert next(iter(geometric_means([row for row in rows if row.batch_size == 8]))) == "large"


@pytest.mark.slow
def test_models_are_timed_in_turns(plain, tmp_path):
    assert run(plain, "--out", tmp_path / "net.onnx") == 0
    session, steps = OnnxSession(tmp_path / "net.onnx"), []
    rows = time_answers({"a": session, "b": session}, session.model.spec.image, [1, 2], advance=steps.append)
    assert [(row.name, row.batch_size) for row in rows] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert len(steps) == 2 * ROUNDS


@pytest.mark.parametrize(("target", "operator"), [("onnxruntime", "QLinearConv"), ("tensorrt", "DequantizeLinear")])
def test_int8_says_how_it_was_calibrated_and_what_it_costs(plain, tmp_path, capsys, target, operator):
    out = tmp_path / "int8.onnx"
    assert run(plain, "--precision", "int8", "--target", target, "--calibration-images", 64, "--out", out) in (0, 1)
    assert "same class on" in capsys.readouterr().out
    record = record_of(out)
    assert (record["precision"], record["target"]) == ("int8", target)
    assert record["cannot_saturate"] == (target == "onnxruntime")  # TensorRT adds its products in 32 bits
    calibration = record["calibration"]
    assert (calibration["images"], calibration["chosen_by"]) == (64, 128)
    assert {(row["lowering"], row["method"]) for row in calibration["candidates"]} == {
        (lowering, method) for lowering in ("skip", "concat") for method in ("min-max", "percentile", "entropy")
    }
    assert record["lowering"] == calibration["candidates"][0]["lowering"]
    assert operator in {node.op_type for node in onnx.load(out).graph.node}
    # The figures are those of the file, on the test images.
    test = datasets.load("digits").test
    accuracy = (OnnxSession(out)(test.images).argmax(1) == test.targets).mean()
    assert record["test"]["accuracy"] == pytest.approx(accuracy)
    assert record["test"]["num_images"] == len(test) == 359


def test_training_images_set_ranges_others_choose_and_neither_are_held_out_or_tested(plain, tmp_path, monkeypatch):
    sets = {}

    def keep(*arguments, observed, chosen_by, **options):
        sets.update(observed=observed, chosen_by=chosen_by)
        return quantize(*arguments, observed=observed, chosen_by=chosen_by, **options)

    monkeypatch.setattr("export.eight_bits.quantize.quantize", keep)
    argv = ["--precision", "int8", "--lowering", "concat", "--calibration-images", 32, "--out", tmp_path / "x.onnx"]
    assert run(plain, *argv) in (0, 1)
    digits = datasets.load_as_trained(load_plain(plain).provenance["training"])
    sets |= {name: np.asarray(getattr(digits, name).images) for name in ("train", "validation", "test")}
    ranges, choice, train, *rest = ({image.tobytes() for image in images} for images in sets.values())
    assert (len(ranges), len(choice)) == (32, 64)
    assert ranges | choice <= train
    assert not ranges & choice
    assert not (ranges | choice) & set.union(*rest)


def test_a_loss_beyond_the_limit_ends_in_status_one_and_is_written_all_the_same(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("export.eight_bits.quantize.ALLOWED_DROP", -1.0)
    argv = (
        plain,
        "--precision",
        "int8",
        "--lowering",
        "concat",
        "--calibration-images",
        32,
        "--out",
        tmp_path / "x.onnx",
    )
    assert run(*argv) == 1
    assert "--allow-drop accepts it" in capsys.readouterr().err
    assert (tmp_path / "x.onnx").exists()
    assert run(*argv, "--allow-drop") == 0


def test_few_training_images_are_shared_out_and_few_test_images_are_said_to_show_little(plain, tmp_path, capsys):
    argv = ("--precision", "int8", "--lowering", "concat", "--calibration-images", 9999, "--out", tmp_path / "x.onnx")
    run(plain, *argv)
    output = capsys.readouterr().out
    record = record_of(tmp_path / "x.onnx")
    calibration = record["calibration"]
    assert (calibration["images"], calibration["chosen_by"]) == (431, 862)
    assert "1294 training images: ranges are set by 431, not 9999" in output
    assert "one image is 0.28 points" in output
    test = record["test"]
    assert test["lost_low"] < test["float32_accuracy"] - test["accuracy"] < test["lost_high"]


def test_what_was_lost_lies_between_the_bounds_of_what_turned_wrong_and_right():
    """Two of 36 turned wrong and one turned right: Wilson's bounds by their own equation."""
    logits = np.eye(2)[np.zeros(36, int)]
    changed = logits.copy()
    changed[:3] = changed[:3, ::-1]
    targets = np.zeros(36, int)
    targets[[0, 3]] = 1  # image 0 turns right, image 3 stays wrong, images 1 and 2 turn wrong
    drop = measure_drop(logits, changed, targets)
    assert drop.float32_accuracy - drop.accuracy == pytest.approx(1 / 36)
    bounds = {}
    for hits in (1, 2):
        share, z = hits / 36, 2.241403
        ends = np.roots([1 + z**2 / 36, -2 * share - z**2 / 36, share**2])  # (p - share)² = z² p (1 - p) / n
        bounds[hits] = sorted(ends.real)
    assert drop.lost_low == pytest.approx(bounds[2][0] - bounds[1][1], abs=1e-9)
    assert drop.lost_high == pytest.approx(bounds[2][1] - bounds[1][0], abs=1e-9)


def test_images_of_another_kind_do_not_calibrate(plain, tmp_path, capsys):
    for label in "ab":
        (tmp_path / label).mkdir()
        for index in range(3):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / label / f"{index}.png")
    argv = (plain, "--precision", "int8", "--dataset", "folder", "--data-dir", tmp_path)
    assert run(*argv) == 2
    assert "folder has 2 classes, and DiracNet-10-0.5 has 10: calibrate on images of these" in capsys.readouterr().err
    assert run(plain, "--precision", "int8", "--dataset", "fashion-mnist") == 2
    assert "fashion-mnist has images of shape (28, 28, 1), the net takes (8, 8, 1)" in capsys.readouterr().err


def test_float16_is_tried_on_the_images_of_the_run_though_their_folder_has_grown(tmp_path, make_spec):
    photos, spec = tmp_path / "photos", make_spec(num_labels=2)
    for path in (photos / label / f"{index}.png" for label in "ab" for index in range(3)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    spec = replace(spec, labels=("a", "b"))
    split, content = datasets.record(datasets.divide(datasets.load("folder", data_dir=photos), 0.0, seed=0))
    (tmp_path / "split.json").write_bytes(content)
    training = {"dataset": "folder", "validation": 0.0, "split": split}
    save_plain(tmp_path / "plain.safetensors", fold_graph(build(spec).eval()), spec, {"training": training})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photos / "a" / "new.png")
    assert run(tmp_path / "plain.safetensors", "--precision", "fp16", "--data-dir", photos) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--precision", "fp8"), "fp8 is for TensorRT: add --target tensorrt"),
        (("--precision", "int8", "--lowering", "auto"), "--lowering auto compares speed"),
        (("--target", "tensorrt"), "--target and --dataset go with int8 and fp8, not with fp32"),
        (("--lowering", "auto", "--batch-sizes", "0"), "must be at least 1"),
        (("--precision", "int8", "--lowering", "mirror"), "has no eight-bit form"),
        (("--precision", "int4"), "invalid choice: 'int4'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(plain, tmp_path, capsys, argv, message):
    assert run(plain, *argv, "--out", tmp_path / "x.onnx") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.slow
def test_a_net_that_does_not_say_what_it_learnt_needs_a_data_set(plain, tmp_path, capsys):
    loaded = load_plain(plain)
    save_plain(tmp_path / "orphan.safetensors", loaded.net, loaded.spec, {})
    assert run(tmp_path / "orphan.safetensors", "--precision", "int8") == 2
    assert "name images to calibrate on" in capsys.readouterr().err
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "photos" / label / f"{index}.png")
    folder = ("--data-dir", tmp_path / "photos")  # alone, as for every command
    assert run(tmp_path / "orphan.safetensors", "--precision", "int8", *folder) == 2
    assert "folder has 2 classes, and DiracNet-10-0.5 has 10" in capsys.readouterr().err
    assert run(tmp_path / "orphan.safetensors", "--precision", "int8", "--dataset", "digits", "--allow-drop") == 0


def test_a_test_image_that_cannot_be_read_is_not_counted_as_another_one(plain, tmp_path, capsys):
    """It was among those that the run recorded, and is damaged since."""
    train, photos = datasets.load("digits").train, tmp_path / "photos"
    for index in range(150):
        path = photos / str(train.targets[index]) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(train.images[index])[..., 0]).save(path)
    loaded = load_plain(plain)
    dataset = datasets.load("folder", data_dir=photos, image=loaded.spec.image, skip_unreadable=True)
    split, content = datasets.record(datasets.divide(dataset, 0.0, seed=0))
    (tmp_path / "split.json").write_bytes(content)
    training = {"dataset": "folder", "data_dir": str(photos), "skip_unreadable": True, "split": split}
    test, damaged = dataset.test, photos / dataset.test.names[0]
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    save_plain(tmp_path / "plain.safetensors", loaded.net, loaded.spec, {"training": training})
    assert run(tmp_path / "plain.safetensors", "--precision", "int8", "--lowering", "concat") == 2
    assert f"1 of {len(test)} test images cannot be read" in capsys.readouterr().err


def test_classes_in_another_order_than_the_data_sets_are_found_by_their_names(plain, tmp_path):
    loaded = load_plain(plain)
    fc = {f"fc.{key}": tensor.flip(0) for key, tensor in loaded.net.graph["fc"].tensors.items()}
    spec = replace(loaded.spec, labels=loaded.spec.labels[::-1])
    save_plain(tmp_path / "turned.safetensors", GraphNet(loaded.net.graph.with_tensors(fc)), spec, {})
    argv = ("--precision", "int8", "--dataset", "digits", "--calibration-images", 64, "--allow-drop")
    for path in (plain, tmp_path / "turned.safetensors"):
        assert run(path, *argv, "--out", tmp_path / f"{path.stem}-int8.onnx") == 0
    straight, turned = (record_of(tmp_path / f"{name}-int8.onnx")["test"] for name in ("plain", "turned"))
    assert turned["float32_accuracy"] == pytest.approx(straight["float32_accuracy"])
    assert min(turned["accuracy"], straight["accuracy"]) > 0.5
