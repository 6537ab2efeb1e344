import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights

from common.cli import run_command
from common.image import decode
from common.refusal import Refusal
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.data import datasets
from train.data.batches import batches
from train.machine import World
from train.run import command
from train.trainer import evaluate

SETTINGS = TrainConfig(flip="yes", crop=0, smallest_crop=0.3, seed=5, workers=0, batch_size=4).resolved()


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten photographs, dark and bright, with structure; wider than high. Their names test five."""
    rng = np.random.default_rng(0)
    for label, base in (("dark", 40), ("light", 200)):
        (tmp_path / label).mkdir()
        for index in range(10):
            pixels = (base + rng.integers(-40, 40, (20, 30, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{index}.png")
    return tmp_path


def all_batches(split, **options):
    changed = {name: options.pop(name) for name in ("workers", "batch_size") if name in options}
    settings = replace(SETTINGS, **changed)
    place = {"epoch": 1, "first_step": 0, "world": World()} | options
    return list(batches(split, settings, datasets.info_of("digits"), **place))


def test_a_folder_without_parts_is_split_and_its_files_are_not_read_into_memory(folder):
    dataset = datasets.load("folder", data_dir=folder, image_size=8)
    assert dataset.info.labels == ("dark", "light")
    assert len(dataset.train) + len(dataset.test) == 20
    assert np.bincount(dataset.test.targets).min() > 0
    assert not set(dataset.train.paths) & set(dataset.test.paths)
    assert all(isinstance(path, str) for path in dataset.train.paths)


def test_parts_are_taken_from_their_folders_and_strange_classes_refused(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    (root / "train").symlink_to(folder)
    (root / "val").symlink_to(folder)
    dataset = datasets.load("folder", data_dir=root, image_size=8)
    assert (len(dataset.train), len(dataset.test)) == (20, 20)
    with pytest.raises(Refusal, match="has 0 class folders"):
        datasets.load("folder", data_dir=folder / "dark", image_size=8)
    (root / "test").mkdir()
    for name in ("dark", "strange"):
        (root / "test" / name).mkdir()
    with pytest.raises(Refusal, match="has classes that training has not: strange"):
        datasets.load("folder", data_dir=root, image_size=8)


def test_evaluation_sees_what_the_server_sees(folder, monkeypatch):
    test = datasets.load("folder", data_dir=folder, image_size=8).test
    expected = np.stack([decode(Path(path).read_bytes(), test.image) for path in test.paths])
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.zeros(len(images), 2)

    monkeypatch.setattr("train.data.batches.JUDGED_PIXELS", 3 * 8 * 8)
    evaluate(Recorder(), test)
    assert max(len(images) for images in seen) <= 3 < len(test)
    np.testing.assert_array_equal(torch.cat(seen).numpy(), expected)
    np.testing.assert_array_equal(test.first(5), expected)


def test_photographs_are_resized_and_cropped_as_imagenets():
    image = datasets.imagenet_image()
    assert (image.height, image.width, image.resize) == (224, 224, 256)
    torchvisions = ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert [*image.mean] == torchvisions.mean
    assert [*image.std] == torchvisions.std
    assert (torchvisions.crop_size, torchvisions.resize_size) == ([224], [256])


def test_batches_are_the_same_for_any_number_of_workers_and_from_any_step(folder):
    train = datasets.load("folder", data_dir=folder, image_size=8).train
    whole = all_batches(train)
    assert [batch.step for batch in whole] == [0, 1, 2]
    assert whole[0].images.shape == (4, 8, 8, 3)
    assert whole[0].images.dtype == torch.uint8
    state = torch.get_rng_state()
    for options in ({"workers": 2}, {"first_step": 2}, {}):
        again = all_batches(train, **options)
        for left, right in zip(reversed(whole), reversed(again)):  # noqa: B905
            assert torch.equal(left.images, right.images)
            assert torch.equal(left.targets, right.targets)
    assert torch.equal(torch.get_rng_state(), state)
    other = all_batches(train, epoch=2)
    assert not any(torch.equal(left.images, right.images) for left, right in zip(whole, other, strict=True))


def test_each_photograph_of_a_batch_has_a_crop_of_its_own(folder):
    content = (folder / "dark" / "0.png").read_bytes()
    for path in folder.rglob("*.png"):
        path.write_bytes(content)
    for batch in all_batches(datasets.load("folder", data_dir=folder, image_size=8).train):
        assert len({image.numpy().tobytes() for image in batch.images}) == len(batch.images)


def test_no_more_workers_than_cores(folder, monkeypatch):
    """PyTorch would warn, which the tests make an error."""
    monkeypatch.setattr("train.data.batches.num_cores", lambda: 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    train = datasets.load("folder", data_dir=folder, image_size=8).train
    assert len(all_batches(train, workers=2)) == 3


def test_processes_share_a_batch_without_overlap(folder):
    for split in (datasets.load("folder", data_dir=folder, image_size=8).train, datasets.load("digits").train):
        whole = all_batches(split)[1]
        shares = [all_batches(split, world=World(rank, 2))[1] for rank in (0, 1)]
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
        assert torch.equal(torch.cat([share.targets for share in shares]), whole.targets)


def test_an_unreadable_file_is_named_counted_and_skipped_only_when_told(folder, capsys):
    (folder / "dark" / "0.png").write_bytes(b"no image")
    (folder / "light" / "3.png").write_bytes((folder / "light" / "3.png").read_bytes()[:300])
    with pytest.raises(Refusal, match=r"2 of 20 images cannot be read, the first is .*dark/0\.png.*--skip-unreadable"):
        datasets.load("folder", data_dir=folder, image_size=8)
    dataset = datasets.load("folder", data_dir=folder, image_size=8, skip_unreadable=True)
    assert len(dataset.train) + len(dataset.test) == 18
    assert [(stranger.path, stranger.why) for stranger in dataset.left_out] == [
        (folder / "dark" / "0.png", "cannot be read"),
        (folder / "light" / "3.png", "cannot be read"),
    ]


def test_a_body_cut_short_shows_when_it_is_decoded(folder):
    """A JPEG has no checksum: its header is sound and its pixels end early."""
    path = folder / "dark" / "0.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    for workers in (0, 1):
        train = datasets.load("folder", data_dir=folder, image_size=8).train
        with pytest.raises(Refusal, match=r"dark/0\.jpg cannot be read"):
            all_batches(train, workers=workers)
    train = datasets.load("folder", data_dir=folder, image_size=8, skip_unreadable=True).train
    assert sum(len(batch.targets) for batch in all_batches(train, batch_size=len(train))) == len(train) - 1
    alone = all_batches(train.take(np.flatnonzero(train.paths == str(path))), batch_size=1)
    assert [batch.images.shape for batch in alone] == [(0, 8, 8, 3)]
    with pytest.raises(Refusal, match=r"none of .*dark/0\.jpg can be read"):
        train.first(1)


@pytest.mark.slow
@pytest.mark.parametrize(("validation", "part"), [("0", "test"), ("0.5", "train")])
def test_what_will_be_judged_is_decoded_before_the_first_epoch(folder, tmp_path_factory, capsys, validation, part):
    root = tmp_path_factory.mktemp("parts")
    for name in ("train", "test"):
        shutil.copytree(folder, root / name)
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    for path in (root / part).glob("*/*.png"):
        Image.fromarray(noise).save(path.with_suffix(".jpg"))
        path.with_suffix(".jpg").write_bytes(path.with_suffix(".jpg").read_bytes()[:2000])
        path.unlink()
    argv = ["--dataset", "folder", "--data-dir", str(root), "--image-size", "8", "--depth", "10", "--width", "0.25"]
    argv += ["--epochs", "1", "--batch-size", "4", "--validation", validation, "--workers", "0"]
    assert run_command(command, TrainConfig, argv=[*argv, "--out", str(root / "run")]) == 2
    output = capsys.readouterr()
    assert "images to be judged are damaged: " in output.err
    assert "is cut short" in output.err
    assert "repair or remove it" in output.err
    assert "epoch 1" not in output.out
    assert not (root / "run" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_folder_with_unreadable_files_trains_when_told_and_says_how_many_were_missing(
    folder, tmp_path_factory, capsys
):
    out = tmp_path_factory.mktemp("run")
    (folder / "dark" / "0.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    for path in sorted(folder.glob("*/[1-9].png")):
        Image.fromarray(noise).save(path.with_suffix(".jpg"))
        path.unlink()
        path = path.with_suffix(".jpg")
        if path.parent.name == "dark":
            path.write_bytes(path.read_bytes()[:2000])
    argv = ["--dataset", "folder", "--data-dir", str(folder), "--image-size", "8", "--depth", "10", "--width", "0.25"]
    argv += ["--epochs", "1", "--batch-size", "4", "--validation", "0", "--workers", "0", "--skip-unreadable"]
    assert run_command(command, TrainConfig, argv=[*argv, "--out", str(out / "some")]) == 0
    output = capsys.readouterr().out
    assert f"left out, cannot be read: 3, first {folder / 'dark' / '0.png'}" in output  # and two to test on
    assert re.search(r"dark +7 +0 +0\nlight +8 +0 +2\n", output)
    assert re.search(r"test accuracy \S+ % on 2 images", output)
    assert "epoch 1: 6 of 12 images could not be read" in output
    assert load_checkpoint(out / "some" / "checkpoint.pt").history[0]["train_loss"] > 0
    tested = {folder / name for name in json.loads((out / "some" / "split.json").read_text())["test"]}
    for path in {*folder.glob("light/*.*")} - tested:
        path.write_bytes(path.read_bytes()[:2000]) if path.suffix == ".jpg" else path.unlink()
    assert run_command(command, TrainConfig, argv=[*argv, "--out", str(out / "none")]) == 2
    assert "none of the 12 training images of epoch 1 could be read" in capsys.readouterr().err
    for path in tested:
        path.write_bytes(path.read_bytes()[:2000])
    assert run_command(command, TrainConfig, argv=[*argv, "--out", str(out / "untested")]) == 2
    assert "none of the images to test on can be decoded" in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_a_folder_learns_it(folder, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("run")
    argv = ["--dataset", "folder", "--data-dir", str(folder), "--image-size", "8", "--depth", "10", "--width", "0.25"]
    argv += [
        "--epochs",
        "12",
        "--lr",
        "0.05",
        "--batch-size",
        "4",
        "--validation",
        "0",
        "--out",
        str(out),
        "--workers",
        "0",
    ]
    assert run_command(command, TrainConfig, argv=argv) == 0
    assert "test accuracy 100.00 % on 5 images" in capsys.readouterr().out
