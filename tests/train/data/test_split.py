"""A split belongs to a run: names decide it, split.json records it, later commands keep to it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import run_command
from common.refusal import Refusal
from common.spec import ImageSpec
from fold.graph import fold
from fold.image_sets import real_images
from fold.plain import load_plain, save_plain
from train.checkpoint import load_checkpoint, load_net
from train.config import TrainConfig
from train.data import datasets
from train.data.folder import make_files, picked_by_name
from train.run import command

SMALL = (
    "--image-size",
    "8",
    "--depth",
    "10",
    "--width",
    "0.25",
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--workers",
    "0",
)


@pytest.fixture
def folder(tmp_path):
    """Two classes of twenty photographs."""
    rng = np.random.default_rng(0)
    for label, base in (("dunkel ä", 40), ("light", 200)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(20):
            add(tmp_path / "photos" / label / f"{index}.png", base, rng)
    return tmp_path / "photos"


def add(path, base, rng):
    Image.fromarray((base + rng.integers(-40, 40, (12, 14, 3))).astype(np.uint8)).save(path)


def parts(dataset):
    dataset = datasets.divide(dataset, 0.2, seed=0)
    return set(dataset.train.names), set(dataset.validation.names), set(dataset.test.names)


def run(*argv):
    return run_command(command, TrainConfig, argv=[*map(str, argv)])


def test_names_pick_about_the_share_of_each_class_and_never_all_or_none():
    names = [f"{index}.jpg" for index in range(4000)]
    targets = np.repeat([0, 1], [3000, 1000])
    picked = picked_by_name(names, targets, 0.2, purpose="test")
    for target, num in ((0, 3000), (1, 1000)):
        share = picked[targets == target].mean()
        assert abs(share - 0.2) < 4 * (0.2 * 0.8 / num) ** 0.5  # four standard deviations
    for num in range(2, 12):
        few = picked_by_name([f"a/{index}" for index in range(num)], np.zeros(num, int), 0.2, purpose="test")
        assert 0 < few.sum() < num
    assert not picked_by_name(["a/0"], np.zeros(1, int), 0.999, purpose="test").any()
    assert not picked_by_name(names, targets, 0.0, purpose="test").any()
    composed, decomposed = (picked_by_name([f"{name}.png" for name in names], np.zeros(2, int), 0.5, purpose="test")
                            for names in (("ä", "b"), ("a\u0308", "b")))  # fmt: skip
    assert np.array_equal(composed, decomposed)


def test_validation_takes_its_share_of_what_is_left_to_train_on():
    """Of other hashes than the test images': the same would be among these already."""
    labels, image = ("a", "b"), ImageSpec(8, 8, 3, (0.4,) * 3, (0.3,) * 3, resize=8)
    paths = [Path(f"/photos/{label}/{index}.jpg") for label in labels for index in range(2000)]
    files = make_files(Path("/photos"), paths, labels, image, skip_unreadable=False)
    rest = files.take(np.flatnonzero(~picked_by_name(files.names, files.targets, 0.2, purpose="test")))
    train, validation = datasets.hold_out(rest, 0.1, seed=0)
    assert sorted([*train.names, *validation.names]) == sorted(rest.names)
    for target in (0, 1):
        num = (rest.targets == target).sum()
        assert abs((validation.targets == target).sum() / num - 0.1) < 4 * (0.1 * 0.9 / num) ** 0.5


def test_more_photographs_move_no_training_image_to_the_test_images(folder):
    before = parts(datasets.load("folder", data_dir=folder, image_size=8))
    assert sum(map(len, before)) == 40
    assert all(before)
    rng = np.random.default_rng(1)
    for name in ("00.png", "5b.png", "aa.png", "zz.png"):
        add(folder / "dunkel ä" / name, 40, rng)
    after = parts(datasets.load("folder", data_dir=folder, image_size=8))
    assert sum(map(len, after)) == 44
    assert not before[0] & after[2]
    assert before[2] <= after[2]


@pytest.mark.slow
def test_a_folder_whose_name_is_not_utf_8_is_recorded_in_words_that_later_commands_read(folder, tmp_path):
    named = folder.rename(tmp_path / b"caf\xe9".decode(errors="surrogateescape"))
    assert run("--data-dir", named, *SMALL, "--out", tmp_path / "run") == 0
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert datasets.load_as_trained(state.config).test.names  # where it lies, in its own bytes
    plain = tmp_path / "plain.safetensors"
    save_plain(plain, fold(load_net(state)), state.spec, {"training": state.training_record()})
    record = load_plain(plain).provenance["training"]
    assert record["folder"] == "caf?"
    assert "--data-dir 'caf?'" in record["command"]


@pytest.mark.slow
def test_a_run_keeps_its_images_when_the_folder_grows_and_refuses_another_one(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ("--data-dir", "photos", *SMALL, "--out", tmp_path / "run")
    assert run(*argv) == 0
    output = capsys.readouterr().out
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    num_test = state.config["split"]["test"]
    assert f"on {num_test} images" in output
    assert state.training_record()["folder"] == "photos"
    dataset = datasets.load_as_trained(state.config, beside=tmp_path / "run")

    rng = np.random.default_rng(2)
    for index in range(4):
        add(folder / "light" / f"new{index}.png", 200, rng)
    assert run(*argv, "--resume") == 0
    assert f"on {num_test} images" in capsys.readouterr().out
    again = datasets.load_as_trained(state.config, beside=tmp_path / "run")
    for part in ("train", "validation", "test"):
        assert getattr(again, part).names == getattr(dataset, part).names
    with pytest.raises(Refusal, match=r"does not hold the images .* keep the run's split\.json beside the model"):
        datasets.load_as_trained(state.config)
    monkeypatch.chdir("/")
    image = ImageSpec(8, 8, 3, (0.5,) * 3, (0.5,) * 3, resize=8)
    images, _ = real_images(image, state.config, num=99, beside=tmp_path / "run")
    assert len(images) == num_test  # although the folder was given by a relative path

    other = shutil.copytree(folder, tmp_path / "other")
    add(other / "light" / "3.png", 90, rng)
    assert run("--data-dir", other, *SMALL, "--out", tmp_path / "run", "--resume") == 2
    output = capsys.readouterr()
    assert "1 images of the run are missing from" in output.err
    assert "test accuracy" not in output.out


def test_what_is_judged_can_be_decoded_and_is_the_same_for_every_later_command(folder):
    """A JPEG cut short shows when it is decoded, so that a count of files would be too many."""
    whole = datasets.divide(datasets.load("folder", data_dir=folder, image_size=8), 0.2, seed=0)
    cut = [str(part.paths[0]) for part in (whole.test, whole.validation)]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    for path in cut:
        noise.save(path, format="JPEG")
        with open(path, "r+b") as file:
            file.truncate(2000)
    dataset = datasets.load("folder", data_dir=folder, image_size=8, skip_unreadable=True)
    dataset = datasets.divide(dataset, 0.2, seed=0)
    assert dataset.train.names == whole.train.names
    assert dataset.test.names == whole.test.names[1:]
    assert dataset.validation.names == whole.validation.names[1:]
    assert {str(stranger.path) for stranger in dataset.left_out} == set(cut)
    split, content = datasets.record(dataset)
    assert split["test"] == len(whole.test) - 1
    run = {"dataset": "folder", "data_dir": str(folder), "validation": 0.2, "skip_unreadable": True, "split": split}
    (folder.parent / "split.json").write_bytes(content)
    for beside in (None, folder.parent):
        again = datasets.load_as_trained(run, beside=beside)
        assert again.test.names == dataset.test.names
        assert len(again.test.first(99)) == split["test"]


@pytest.mark.slow
def test_a_run_that_recorded_no_division_of_its_folder_is_not_resumed(folder, tmp_path, capsys):
    """A new one would test on images that it trained on."""
    argv = ("--data-dir", folder, *SMALL, "--out", tmp_path / "run")
    assert run(*argv) == 0
    path = tmp_path / "run" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    del content["config"]["split"]
    torch.save(content, path)
    assert run(*argv, "--resume") == 2
    assert "does not record which images it trained on" in capsys.readouterr().err


@pytest.mark.slow
def test_no_file_but_the_checkpoint_says_where_the_photographs_lie(folder, tmp_path):
    from export.to_onnx import ToOnnxConfig
    from export.to_onnx import command as to_onnx
    from fold.run import FoldConfig
    from fold.run import command as fold

    assert run("--data-dir", folder, *SMALL, "--out", tmp_path / "run") == 0
    assert run_command(fold, FoldConfig, argv=[str(tmp_path / "run" / "checkpoint.pt")]) == 0
    assert run_command(to_onnx, ToOnnxConfig, argv=[str(tmp_path / "run" / "plain.safetensors")]) == 0
    for name in ("plain.safetensors", "plain.onnx"):
        content = (tmp_path / "run" / name).read_bytes()
        assert str(tmp_path).encode() not in content
        assert b"--data-dir photos" in content


def test_the_record_of_images_in_memory_depends_on_every_image_target_and_part():
    images, targets = np.zeros((6, 2, 2, 1), np.uint8), np.arange(6)
    info = datasets.INFO["digits"]

    def digest(images, targets, num_train=3):
        train, validation, test = (
            datasets.Split(images[part], targets[part]) for part in (slice(num_train), slice(num_train, 4), slice(4, 6))
        )
        return datasets.record(datasets.Dataset(info, train, test, validation))[0]["sha256"]

    found = [digest(images, targets), digest(images, targets, num_train=2)]
    for index in range(6):
        others = images.copy(), targets.copy()
        others[0][index, 1, 1], others[1][index] = 1, 9
        found += [digest(others[0], targets), digest(images, others[1])]
    assert len(set(found)) == len(found)
    assert digest(images.copy(), targets.copy()) == found[0]


def test_images_in_memory_that_are_not_the_runs_are_refused():
    dataset = datasets.divide(datasets.load("digits"), 0.1, seed=0)
    split, _ = datasets.record(dataset)
    training = {"dataset": "digits", "validation": 0.1, "seed": 0, "split": split}
    assert len(datasets.load_as_trained(training).test) == 359
    with pytest.raises(Refusal, match="digits does not hold the images"):
        datasets.load_as_trained(training | {"seed": 1})
