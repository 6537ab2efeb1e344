"""Everything that lies in a folder of photographs is trained on, or named."""

import pytest
from PIL import Image
from rich.console import Console

from common.image import SUFFIXES
from common.refusal import Refusal
from train.config import TrainConfig
from train.data import datasets
from train.report import print_survey


def save(path, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path)


def load(folder):
    return datasets.load("folder", data_dir=folder, image_size=8)


def test_what_is_left_out_is_named_with_its_reason_before_training(tmp_path, capsys):
    for index in range(6):
        save(tmp_path / "cats" / f"{index}.JPG", (20 + index, 10))
        save(tmp_path / "big dogs" / f"{index}.png", (30, 40 + index))
    save(tmp_path / "fish" / "only.png")
    for name in ("cats/a.tif", "cats/b.tiff", "cats/sub/c.png", "big dogs/._0.png", "__MACOSX/cats/0.png"):
        save(tmp_path / name)
    (tmp_path / "cats" / "d.HEIC").write_bytes(b"heic")
    print_survey(Console(width=160, soft_wrap=True, highlight=False), datasets.divide(load(tmp_path), 0.2, seed=0))
    lines = capsys.readouterr().out.splitlines()
    counts = {line[:8].strip(): [int(word) for word in line[8:].split()] for line in lines[1:5]}
    assert {label: sum(row) for label, row in counts.items()} == {"cats": 6, "big dogs": 6, "fish": 1, "all": 13}
    assert counts["fish"] == [1, 0, 0]
    assert "sizes from 12x10 to 30x45 pixels" in lines
    assert "no image to test on: fish" in lines
    left_out = "\n".join(lines[-3:])
    assert f"not one of {', '.join(SUFFIXES)}: 3, first {tmp_path / 'cats' / 'a.tif'}" in left_out
    assert f"a folder inside a class folder: 1, first {tmp_path / 'cats' / 'sub'}" in left_out
    assert "hidden, or an operating system's own: 2" in left_out


def test_names_of_any_bytes_are_shown_each_on_its_line(tmp_path, capsys):
    for index in range(4):
        save(tmp_path / "two\nlines" / f"{index}.png")
        save(tmp_path / "\x1b[31mred" / f"{index}.png")
    (tmp_path / "two\nlines" / b"\xff.txt".decode(errors="surrogateescape")).write_bytes(b"no image")
    print_survey(Console(width=160, soft_wrap=True), datasets.divide(load(tmp_path), 0.2, seed=0))
    lines = capsys.readouterr().out.encode().decode().splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["class", "?[31mred", "two?lines", "all"]
    assert f"first {tmp_path / 'two?lines' / '?.txt'}" in lines[-1]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_all_usual_names_of_parts_are_understood(tmp_path, name):
    for part, num in (("train", 3), (name, 2), ("extra", 1)):
        for index in range(num):
            save(tmp_path / part / "a" / f"{part}{index}.png")
            save(tmp_path / part / "b" / f"{part}{index}.png")
    dataset = load(tmp_path)
    assert (len(dataset.train), len(dataset.test), dataset.validation) == (6, 4, None)
    assert [(stranger.path.name, stranger.why) for stranger in dataset.left_out] == [("extra", "not one of the parts")]
    save(tmp_path / "test" / "a" / "t.png")
    dataset = datasets.divide(load(tmp_path), 0.1, seed=0)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [6, 4, 1]
    assert all(part in path for part, path in zip((name,) * 4, dataset.validation.paths, strict=True))


def test_a_class_may_be_called_train(tmp_path):
    for label in ("train", "bus"):
        for index in range(4):
            save(tmp_path / label / f"{index}.png")
    assert load(tmp_path).info.labels == ("bus", "train")


def test_a_class_without_an_image_and_a_folder_without_test_images_are_refused(tmp_path):
    for label in ("a", "b"):
        save(tmp_path / label / "0.png")
    with pytest.raises(Refusal, match=r"no image of .* is left to test on: a class needs two or more"):
        load(tmp_path)
    save(tmp_path / "a" / "1.png")
    assert [len(part) for part in (load(tmp_path).train, load(tmp_path).test)] == [2, 1]
    (tmp_path / "c").mkdir()
    with pytest.raises(Refusal, match=r"no \.png.* image to train on for c in .*add images, or remove the folder"):
        load(tmp_path)


def test_a_folder_that_is_given_is_what_is_learnt(tmp_path):
    assert TrainConfig(data_dir=tmp_path).resolved().dataset == "folder"
    assert TrainConfig(data_dir=tmp_path, dataset="cifar10").resolved().dataset == "cifar10"
    assert TrainConfig().resolved().dataset == "digits"
    with pytest.raises(Refusal, match="digits are bundled with scikit-learn: leave out --data-dir"):
        datasets.load("digits", data_dir=tmp_path)
