import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from common.refusal import Refusal
from train.config import TrainConfig
from train.data import datasets
from train.data.batches import augment, batches, erase
from train.machine import World


def write_idx(path, array, *, compress=False):
    """The format of MNIST's files: magic number, sizes, bytes."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


def test_digits_are_split_the_same_way_each_time_and_span_the_whole_range():
    dataset = datasets.load("digits")
    assert dataset.train.images.shape == (1438, 8, 8, 1)
    assert dataset.test.images.shape == (359, 8, 8, 1)
    assert dataset.train.images.dtype == np.uint8
    assert (dataset.train.images.min(), dataset.train.images.max()) == (0, 255)
    pixels = dataset.train.images / 255
    assert pixels.mean() == pytest.approx(dataset.info.image.mean[0], abs=1e-3)
    assert pixels.std() == pytest.approx(dataset.info.image.std[0], abs=1e-3)


@pytest.mark.parametrize("compress", [False, True])
def test_fashion_mnist_files_are_read_plain_and_compressed(tmp_path, compress):
    rng = np.random.default_rng(0)
    for part, num in (("train", 6), ("t10k", 3)):
        end = ".gz" if compress else ""
        images = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        with_path = tmp_path / f"{part}-images-idx3-ubyte{end}"
        write_idx(with_path, images, compress=compress)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{end}", np.arange(num, dtype=np.uint8), compress=compress)
    dataset = datasets.load("fashion-mnist", data_dir=tmp_path)
    assert np.array_equal(dataset.test.images[..., 0], images)
    assert dataset.test.targets.tolist() == [0, 1, 2]
    assert dataset.info.labels[9] == "Ankle boot"


def test_what_is_no_file_of_fashion_mnist_is_passed_over(tmp_path):
    """A file in a folder's place, and folders in the files' places, as some archives are unpacked."""
    (tmp_path / "file").write_text("")
    for part in ("train", "t10k"):
        (tmp_path / "folder" / f"{part}-images-idx3-ubyte").mkdir(parents=True)
    for place in ("file", "folder"):
        with pytest.raises(Refusal, match=f"Fashion-MNIST is not in {tmp_path / place}: install"):
            datasets.load("fashion-mnist", data_dir=tmp_path / place)


def test_images_and_labels_of_different_number_are_refused(tmp_path):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.zeros(1, np.uint8))
    with pytest.raises(Refusal, match="train-images-idx3-ubyte has 3 images, train-labels-idx1-ubyte 1 labels"):
        datasets.load("fashion-mnist", data_dir=tmp_path)


@pytest.mark.parametrize(("name", "num_labels"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_files_that_are_not_torchvisions_are_refused(tmp_path, name, num_labels):
    assert len(datasets.info_of(name).labels) == num_labels
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({}))
    with pytest.raises(Refusal, match=f"{name} is not readable in"):
        datasets.load(name, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "parts", "key"),
    [
        ("cifar10", "cifar-10-batches-py", {f"data_batch_{i}": 2 for i in range(1, 6)} | {"test_batch": 3}, "labels"),
        ("cifar100", "cifar-100-python", {"train": 10, "test": 3}, "fine_labels"),
    ],
)
def test_cifar_files_are_read_in_their_real_format(tmp_path, monkeypatch, name, folder, parts, key):
    """Small files as the authors pickle them; only torchvision's checksums, which they cannot have, are set aside."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    (tmp_path / folder).mkdir()
    labels = list(datasets.info_of(name).labels)
    meta = {"label_names": labels, "fine_label_names": labels}
    (tmp_path / folder / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(meta))
    rng = np.random.default_rng(0)
    for part, num in parts.items():
        rows = rng.integers(0, 256, (num, 3 * 32 * 32), dtype=np.uint8)  # red plane, green plane, blue plane
        (tmp_path / folder / part).write_bytes(pickle.dumps({"data": rows, key: list(range(num))}))
    dataset = datasets.load(name, data_dir=tmp_path)
    assert dataset.train.images.shape == (10, 32, 32, 3)
    assert np.array_equal(dataset.test.images, rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert dataset.test.targets.tolist() == [0, 1, 2]


def test_held_out_images_are_not_trained_on():
    whole = datasets.load("digits").train
    rest, held = datasets.hold_out(whole, 0.1, seed=3)
    assert (len(rest), len(held)) == (1294, 144)
    again = datasets.hold_out(whole, 0.1, seed=3)[1]
    assert np.array_equal(held.images, again.images)
    assert len(datasets.hold_out(whole, 0, seed=3)[1]) == 0


def test_augmentation_shifts_over_a_reflected_border_and_mirrors():
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8, 1).expand(200, 8, 8, 1)
    generator = torch.Generator().manual_seed(0)
    out = augment(images, flip=True, crop=2, generator=generator)
    padded = np.pad(images[0, :, :, 0].numpy(), 2, mode="reflect")
    views = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    allowed = {view[:, ::step].tobytes() for view in views for step in (1, -1)}
    seen = {image.numpy().tobytes() for image in out[..., 0]}
    assert seen <= allowed
    assert len(seen) > 40  # of 50
    same = augment(images, flip=False, crop=0, generator=generator)
    assert torch.equal(same, images)


@pytest.mark.parametrize(
    ("dataset", "options", "num_views"),
    [
        ("digits", {}, 1),
        ("fashion-mnist", {}, 9 * 2),  # one pixel in each direction, mirrored or not
        ("fashion-mnist", {"crop": 0}, 2),
        ("fashion-mnist", {"flip": "no"}, 9),
        ("digits", {"crop": 2, "flip": "yes"}, 25 * 2),
    ],
)
def test_a_data_set_is_shifted_and_mirrored_as_it_allows_unless_other_means_are_given(dataset, options, num_views):
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(2000, axis=0)
    split, info = datasets.Split(image, np.zeros(2000, np.int64)), datasets.INFO[dataset]
    settings = TrainConfig(dataset=dataset, batch_size=2000, **options).resolved()
    (batch,) = batches(split, settings, info, World(), epoch=0, first_step=0)
    assert len({view.numpy().tobytes() for view in batch.images}) == num_views


def test_each_step_and_each_epoch_shifts_images_of_its_own():
    split = datasets.Split(
        np.random.default_rng(0).integers(0, 256, (1, 9, 9, 1), np.uint8).repeat(60, 0), np.zeros(60, int)
    )
    settings = TrainConfig(crop=2, batch_size=20).resolved()
    epochs = [
        batches(split, settings, datasets.INFO["digits"], World(), epoch=epoch, first_step=0) for epoch in (0, 0, 1)
    ]
    first, again, other = ([batch.images.numpy().tobytes() for batch in epoch] for epoch in epochs)
    assert first == again
    assert len({*first, *other}) == 2 * 3


def test_erasing_fills_one_rectangle_in_the_share_of_images_that_was_asked_for():
    images = torch.zeros(1000, 20, 30, 2, dtype=torch.uint8)

    def run(share, rows=slice(None), batch=images):
        generator = torch.Generator().manual_seed(0)
        return erase(batch, share, (7, 9), num=1000, rows=rows, generator=generator)

    out = run(0.5)
    erased = (out[..., 0] == 7) & (out[..., 1] == 9)
    assert torch.equal(erased, out.sum(-1) > 0)
    num = erased.sum((1, 2))
    assert (num > 0).float().mean() == pytest.approx(0.5, abs=0.05)
    areas = num[num > 0] / 600
    assert 0.01 < areas.min() < 0.04
    assert 0.28 < areas.max() < 0.36
    for mask in erased[num > 0][:50]:  # filled from edge to edge
        lines, columns = mask.any(1), mask.any(0)
        assert mask.sum() == lines.sum() * columns.sum()
    assert torch.equal(run(0.5, slice(300, 500), images[300:500]), out[300:500])
    assert torch.equal(run(0.0), images)
