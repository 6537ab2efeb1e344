"""What export/predict.py says of images is what the server says of them."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from common.cli import run_command
from common.refusal import Refusal
from export.artefacts import open_artefact
from export.evaluation.answering import BATCH_SIZE, answer_each
from export.predict import PredictConfig, command
from export.runtimes.onnx_session import OnnxSession
from fold.graph import fold
from fold.plain import save_plain
from serve.request.app import make_app
from serve.request.limits import Limits
from train.checkpoint import Checkpoint, save_checkpoint
from train.data.folder import SUFFIXES


@pytest.fixture
def photos(tmp_path, images):
    """Five readable files in two folders, some with awkward names, beside what is no image."""
    root = tmp_path / "my photos"
    (root / "Kätzchen" / "further down").mkdir(parents=True)
    (root / "__MACOSX").mkdir()
    names = ["Kätzchen/a.png", "Kätzchen/B 1.JPG", "Kätzchen/further down/c.webp", "d,e.bmp", 'say "f".png']
    for name, pixels in zip(names, images(5, 12), strict=True):
        Image.fromarray(pixels).save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "__MACOSX" / "a.png").write_bytes(b"junk")
    return root


def run(*argv):
    return run_command(command, PredictConfig, argv=[*map(str, argv)])


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_every_image_has_the_row_that_the_server_would_answer(write_onnx, photos, tmp_path, capsys):
    _, model = write_onnx()
    assert run(model, photos, "--top-k", 3, "--out", tmp_path / "out.json") == 0
    assert run(model, photos, "--top-k", 3, "--out", tmp_path / "out.csv") == 0
    output = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out.csv'}: 5 of 5 images answered" in output
    assert "notes.txt" in output
    assert "__MACOSX" in output
    found = json.loads((tmp_path / "out.json").read_text())
    with TestClient(make_app(OnnxSession(model), Limits())) as client:
        for row in found["results"]:
            with open(row.pop("image"), "rb") as file:
                answer = client.post("/predict?top_k=3", content=file.read()).json()
            assert found["model"] == answer["model"]
            (expected,) = answer["results"]
            assert [guess["index"] for guess in row["top"]] == [guess["index"] for guess in expected["top"]]
            for guess, theirs in zip([row, *row["top"]], [expected, *expected["top"]], strict=True):
                # A net of other batch sizes rounds differently, by 1e-6 of the largest logit.
                assert guess["probability"] == pytest.approx(theirs["probability"], rel=1e-4)
    names = {row["image"] for row in rows_of(tmp_path / "out.csv")}
    assert {path.removeprefix(f"{photos}/") for path in names} == {
        "Kätzchen/B 1.JPG", "Kätzchen/a.png", "Kätzchen/further down/c.webp", "d,e.bmp", 'say "f".png',
    }  # fmt: skip
    for row, result in zip(rows_of(tmp_path / "out.csv"), found["results"], strict=True):
        guesses = [(row[f"label{rank}"], float(row[f"probability{rank}"])) for rank in ("", "_2", "_3")]
        assert guesses == [(guess["label"], guess["probability"]) for guess in result["top"]]
        assert row["error"] == ""


def test_every_artefact_of_the_road_gives_the_same_rows(make_net, make_spec, write_onnx, photos, tmp_path):
    net, model = write_onnx()
    save_plain(tmp_path / "plain.safetensors", fold(net).float(), make_spec(), {})
    checkpoint = Checkpoint.fresh(make_spec(), net.state_dict(), {})
    save_checkpoint(tmp_path / "checkpoint.pt", checkpoint)
    answers = {}
    for path in (model, tmp_path / "plain.safetensors", tmp_path / "checkpoint.pt"):
        assert run(path, photos, "--out", tmp_path / "out.csv") == 0
        answers[path.suffix] = [
            (row["image"], row["label"], round(float(row["probability"]), 4)) for row in rows_of(tmp_path / "out.csv")
        ]
    assert answers[".onnx"] == answers[".safetensors"] == answers[".pt"]


def test_what_cannot_be_read_is_named_and_counted_and_the_rest_is_answered(write_onnx, photos, tmp_path, capsys):
    _, model = write_onnx()
    whole = (photos / "Kätzchen" / "a.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[:-30])
    (photos / "junk.jpg").write_bytes(b"no image")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    assert run(model, photos, "--out", tmp_path / "out.csv") == 1
    output = capsys.readouterr().out
    for name in ("cut.png", "junk.jpg", "gone.png"):
        assert f"not answered: {photos / name}: " in output
    assert "5 of 8 images answered" in output
    errors = {row["image"]: row["error"] for row in rows_of(tmp_path / "out.csv") if not row["label"]}
    assert {path.removeprefix(f"{photos}/") for path in errors} == {"cut.png", "junk.jpg", "gone.png"}
    assert all(errors.values())


def test_file_names_that_are_not_utf_8_keep_their_bytes(write_onnx, photos, tmp_path, capsys):
    _, model = write_onnx()
    name = b"\xff.png"
    (photos / name.decode(errors="surrogateescape")).write_bytes(b"no image")
    assert run(model, photos, "--out", tmp_path / "out.csv") == 1
    assert "/?.png: not a PNG" in capsys.readouterr().out
    assert b"/" + name + b"," in (tmp_path / "out.csv").read_bytes()


def test_no_more_than_two_batches_are_in_memory(write_onnx, images):
    form = open_artefact(write_onnx()[1])
    loaded = []

    def load(index):
        loaded.append(index)
        return images(1)[0]

    answers = answer_each(form, range(10 * BATCH_SIZE), load)
    next(answers)
    assert len(loaded) <= 2 * BATCH_SIZE
    assert sum(1 for _ in answers) == 10 * BATCH_SIZE - 1
    assert sorted(loaded) == list(range(10 * BATCH_SIZE))


def test_answers_come_in_order_around_those_that_fail(write_onnx, images):
    form = open_artefact(write_onnx()[1])
    pixels = images(BATCH_SIZE + 5)

    def load(index):
        if index % 7 == 0:
            raise Refusal(f"image {index}")
        return pixels[index]

    answers = list(answer_each(form, range(len(pixels)), load))
    logits = form.answer(pixels).astype(np.float64)
    powers = np.exp(logits)
    for index, answer in enumerate(answers):
        if index % 7 == 0:
            assert str(answer) == f"image {index}"
        else:
            assert answer == pytest.approx(powers[index] / powers[index].sum(), rel=1e-4)


def test_somebody_elses_net_is_read_as_its_user_says(write_foreign, photos, tmp_path, capsys):
    matrix = np.array([[0.1, 0.5, 0.2, 0.2]] * 3)
    model = write_foreign(matrix=matrix)
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nfour\n")
    flags = ("--labels", tmp_path / "names.txt", "--mean", 0, 0, 0, "--std", 1, 1, 1)
    assert run(model, photos, *flags, "--probabilities", "--out", tmp_path / "out.csv") == 0
    assert "labels by the command line" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out.csv")
    assert {row["label"] for row in rows} == {"two"}
    given = [float(row["probability"]) for row in rows]
    assert run(model, photos, *flags, "--out", tmp_path / "out.csv") == 0
    for row, value in zip(rows_of(tmp_path / "out.csv"), given, strict=True):
        shares = np.exp(value * np.array([0.2, 1, 0.4, 0.4]))
        assert float(row["probability"]) == pytest.approx(1 / (shares / shares[1]).sum(), rel=1e-5)
    assert run(write_foreign(matrix=np.full((3, 4), np.nan)), photos, "--out", tmp_path / "out.csv") == 1
    assert {row["error"] for row in rows_of(tmp_path / "out.csv")} == {
        "the model answers with values that are not numbers"
    }


def test_a_folder_and_a_file_in_it_are_one_image_each(write_onnx, photos, tmp_path, capsys):
    _, model = write_onnx()
    assert run(model, photos / "d,e.bmp", photos, "--out", tmp_path / "out.csv") == 0
    assert "5 of 5 images" in capsys.readouterr().out
    assert rows_of(tmp_path / "out.csv")[0]["image"] == str(photos / "d,e.bmp")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plain.onnx", "missing", "photos"], "missing is not there"),
        (["plain.onnx", "empty"], f"no {', '.join(SUFFIXES)} images in"),
        (["plain.onnx", "photos", "--out", "out.txt"], "must end with .csv or .json"),
        (["plain.onnx", "photos", "--top-k", "0"], "must be 1 or more, got 0"),
        (["plain.onnx"], "name one image or folder or more"),
        (["plain.onnx", "photos", "--mean", "0", "0", "0"], "says itself how it is read; leave --mean out"),
        (["plain.safetensors", "photos", "--mean", "0", "0", "0"], "says itself how it is read; leave --mean out"),
        (["gone.onnx", "photos"], "cannot read"),
        (["photos", "photos"], "is not an artefact of this project"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(argv, message, write_onnx, photos, tmp_path, capsys, monkeypatch):
    write_onnx()
    (tmp_path / "empty").mkdir()
    photos.rename(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "predictions.csv").exists()


@pytest.mark.slow
def test_an_onnx_file_is_answered_without_torch(write_onnx, images, tmp_path):
    _, path = write_onnx()
    Image.fromarray(images(1)[0].squeeze()).save(tmp_path / "0.png")
    argv = ["predict.py", str(path), str(tmp_path / "0.png"), "--out", str(tmp_path / "out.csv")]
    program = (
        f"import sys; sys.modules['torch'] = None; sys.argv = {argv!r}; from export import predict; "
        "sys.exit(predict.run_command(predict.command, predict.PredictConfig))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "out.csv").exists()) == (0, True), done.stderr
