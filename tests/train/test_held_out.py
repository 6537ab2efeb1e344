import numpy as np
import pytest
from PIL import Image

from common.cli import run_command
from train.config import TrainConfig
from train.data import datasets
from train.held_out import HeldOutConfig, command
from train.run import command as train


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(12):
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
                tmp_path / "photos" / label / f"{index}.jpg"
            )
    return tmp_path / "photos"


def write(*argv):
    return run_command(command, HeldOutConfig, argv=[str(word) for word in argv])


def test_photographs_of_all_classes_are_copied_as_they_are(photos, tmp_path):
    assert write("--data-dir", photos, "--out", tmp_path / "out", "--count", 4) == 0
    written = sorted((tmp_path / "out").iterdir())
    assert {path.name.partition("_")[0] for path in written} == {"dark", "light"}
    test = datasets.load("folder", data_dir=photos).test
    assert {path.read_bytes() for path in written} <= {(photos / name).read_bytes() for name in test.names}
    assert len(written) == 4


@pytest.mark.slow
def test_a_run_names_what_it_has_tested_on_though_the_folder_has_grown(photos, tmp_path, capsys):
    argv = ["--data-dir", str(photos), "--depth", "10", "--width", "0.25", "--image-size", "8", "--epochs", "1"]
    assert run_command(train, TrainConfig, argv=[*argv, "--out", str(tmp_path / "run")]) == 0
    tested = {(photos / name).read_bytes() for name in datasets.load("folder", data_dir=photos).test.names}
    for index in range(30):
        Image.new("RGB", (9, 9), (index, 0, 0)).save(photos / "dark" / f"new{index}.jpg")
    assert write("--run", tmp_path / "run", "--out", tmp_path / "out", "--count", 100) == 0
    assert {path.read_bytes() for path in (tmp_path / "out").iterdir()} == tested
    assert write("--run", tmp_path / "run", "--dataset", "digits") == 2
    assert "leave out --dataset" in capsys.readouterr().err
