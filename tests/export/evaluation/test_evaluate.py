"""export/evaluate.py judges what training has not seen, and says so in files that stand alone."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from common.cli import run_command
from common.image import decode
from common.spec import ImageSpec, Spec
from export.artefacts import open_artefact
from export.evaluate import EvaluateConfig, command
from export.graphs.graph import to_onnx
from fold.graph import fold
from train.checkpoint import Checkpoint, save_checkpoint
from train.data import datasets
from train.data.folder import FILE, SUFFIXES

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FILES = {"report.html", "report.json", "confusion.png", "reliability.png", "mistakes.png"}
LABELS = ("Kätzchen", "a <b>&", "c")


def run(*argv):
    return run_command(command, EvaluateConfig, argv=[*map(str, argv)])


@pytest.fixture
def photos(tmp_path):
    """Three classes of ten photographs of noise."""
    rng = np.random.default_rng(0)
    for label in LABELS:
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(10):
            pixels = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def trained(photos, tmp_path, make_net, make_spec):
    """A run on the photographs as training leaves it, but for the training: its folder."""
    run = tmp_path / "run"
    fields = {"num_labels": 3, "size": 8}
    spec = make_spec(**fields)
    spec = Spec(**{**vars(spec), "labels": LABELS})
    dataset = datasets.divide(datasets.load("folder", data_dir=photos, image_size=8), 0.2, seed=0)
    split, content = datasets.record(dataset)
    run.mkdir()
    (run / FILE).write_bytes(content)
    config = {"dataset": "folder", "data_dir": str(photos), "validation": 0.2, "seed": 0, "split": split}
    net = make_net(**fields)
    checkpoint = Checkpoint.fresh(spec, net.state_dict(), config)
    save_checkpoint(run / "checkpoint.pt", checkpoint)
    model = to_onnx(fold(net), spec, {"training": checkpoint.training_record()})
    (run / "plain.onnx").write_bytes(model.SerializeToString())
    return run


@pytest.fixture
def digits_net(tmp_path, make_net):
    """A plain.onnx of digits, untrained."""
    net = make_net(size=8, channels=1)
    image = ImageSpec(8, 8, 1, (0.4,), (0.3,), resize=8)
    spec = Spec("cifar", 10, 0.25, "ncrelu", image, tuple("0123456789"))
    path = tmp_path / "digits.onnx"
    path.write_bytes(to_onnx(fold(net), spec, {"training": {"dataset": "digits"}}).SerializeToString())
    return path


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_the_test_images_of_the_run_are_judged_and_no_other(trained, photos, tmp_path, capsys):
    recorded = json.loads((trained / FILE).read_text())
    out = tmp_path / "report"
    assert run(trained / "plain.onnx", "--data-dir", photos, "--out", out) == 0
    assert "test images that its run recorded, which training has not seen" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    report = json.loads((out / "report.json").read_text())
    names = sorted(recorded["test"])
    form = open_artefact(trained / "plain.onnx")
    pixels = np.stack([decode((photos / name).read_bytes(), form.spec.image) for name in names])
    logits = form.answer(pixels).astype(np.float64)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    truths = np.array([LABELS.index(name.split("/")[0]) for name in names])
    wrong = {name: share for name, share, truth in zip(names, shares, truths, strict=True)
             if share.argmax() != truth}  # fmt: skip
    assert report["images"]["num"] == len(names)
    assert report["top1"]["hits"] == len(names) - len(wrong)
    assert {row["image"] for row in report["mistakes"]} == set(wrong)
    surest = [row["probability"] for row in report["mistakes"]]
    assert surest == sorted(surest, reverse=True)
    for row in report["mistakes"]:
        assert row["answer"] == LABELS[wrong[row["image"]].argmax()]
        assert row["truth"] == row["image"].split("/")[0]
        assert row["probability"] == pytest.approx(wrong[row["image"]].max(), rel=1e-4)

    rng = np.random.default_rng(9)
    for index in range(5):  # the folder has grown
        noise = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / "c" / f"new {index}.png")
    assert run(trained / "checkpoint.pt", "--out", out, "--json") == 0  # which knows where its photographs lie
    again = json.loads(capsys.readouterr().out)
    assert again == json.loads((out / "report.json").read_text())
    assert again["confusion"] == report["confusion"]
    assert again["model"]["file"] == "checkpoint.pt"


def test_a_folder_that_does_not_fit_the_record_is_refused(trained, photos, tmp_path, capsys):
    argv = (trained / "plain.onnx", "--out", tmp_path / "report")
    assert run(*argv) == 2
    assert "does not say where its photographs lie: name their folder with --data-dir" in capsys.readouterr().err
    Image.new("RGB", (50, 50)).save(photos / LABELS[0] / "0.png")
    assert run(*argv, "--data-dir", photos) == 2
    assert "1 images of the run are missing from" in capsys.readouterr().err
    (trained / FILE).unlink()
    assert run(*argv, "--data-dir", photos, "--dataset", "folder") == 2
    assert "keep the run's split.json beside the model" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.fixture
def others(photos, tmp_path):
    """Another folder: new photographs of two classes, four that the run has, a class that the model does not know."""
    folder = tmp_path / "others"
    rng = np.random.default_rng(5)
    for label in (LABELS[0], LABELS[2], "dog", "empty one"):
        (folder / label).mkdir(parents=True)
    for label in (LABELS[0], LABELS[2], "dog"):
        for index in range(6):  # some are called like photographs of the run
            pixels = rng.integers(0, 256, (20, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return folder


@pytest.mark.slow
def test_another_folder_is_judged_without_what_was_trained_on(trained, photos, others, tmp_path, capsys):
    recorded = json.loads((trained / FILE).read_text())
    learnt = [name for name in recorded["train"] if name.startswith(LABELS[2])][:2]
    learnt += [name for name in recorded["validation"] if name.startswith(LABELS[2])][:1]
    tested = next(name for name in recorded["test"] if name.startswith(LABELS[2]))
    for name in (*learnt, tested):
        shutil.copy(photos / name, others / name)
    new = [path for label in (LABELS[0], LABELS[2]) for path in (others / label).iterdir()]
    out = tmp_path / "report"
    assert run(trained / "plain.onnx", "--data-dir", others, "--out", out) == 0
    text = capsys.readouterr().out
    num = len(new) - len(learnt)
    assert (
        f"{num} images of another folder than its run's, which training has not seen; there is none of a <b>&" in text
    )
    assert "left out, the model was trained on it: 3, first " in text
    assert "left out, the model has no class dog: 6, first " in text
    report = json.loads((out / "report.json").read_text())
    assert report["images"]["num"] == num
    assert not {row["image"] for row in report["mistakes"]} & set(learnt)
    form = open_artefact(trained / "plain.onnx")
    judged = [path for path in new if path.relative_to(others).as_posix() not in learnt]
    logits = form.answer(np.stack([decode(path.read_bytes(), form.spec.image) for path in judged]))
    truths = np.array([LABELS.index(path.parent.name) for path in judged])
    assert report["top1"]["hits"] == int((logits.argmax(1) == truths).sum())


def test_another_folder_of_nothing_but_strangers_is_refused(trained, others, photos, tmp_path, capsys):
    argv = (trained / "plain.onnx", "--out", tmp_path / "report", "--data-dir", others)
    recorded = json.loads((trained / FILE).read_text())
    for label in (LABELS[0], LABELS[2]):
        shutil.rmtree(others / label)
    assert run(*argv) == 2
    assert "does not answer dog, empty one" in capsys.readouterr().err
    (others / "c").mkdir()
    name = next(name for name in recorded["train"] if name.startswith("c/"))
    shutil.copy(photos / name, others / name)
    shutil.rmtree(others / "dog")
    assert run(*argv) == 2
    assert "is left to judge" in (error := capsys.readouterr().err)
    assert "the model was trained on it" in error


def test_a_run_that_recorded_no_division_is_not_judged_on_its_folder(photos, tmp_path, make_net, make_spec, capsys):
    path = tmp_path / "plain.onnx"
    model = to_onnx(fold(make_net(num_labels=3)), make_spec(num_labels=3), {"training": {"dataset": "folder"}})
    path.write_bytes(model.SerializeToString())
    assert run(path, "--data-dir", photos) == 2
    assert "does not record which images it was trained on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_data_set_by_name_is_judged_on_its_test_images(digits_net, tmp_path, capsys):
    assert run(digits_net, "--out", tmp_path) == 0
    assert "on 359 test images of digits" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    test = datasets.load("digits").test
    called = open_artefact(digits_net).answer(np.asarray(test.images)).argmax(1)
    assert report["top1"]["hits"] == (called == test.targets).sum()
    assert np.array(report["confusion"]).sum() == 359
    assert report["top5"]["num"] == 359
    assert run(digits_net, "--dataset", "cifar10", "--out", tmp_path) == 2
    assert run(digits_net, "--dataset", "fashion-mnist", "--data-dir", tmp_path, "--out", tmp_path) == 2
    assert run(digits_net, "--data-dir", tmp_path) == 2
    assert "digits are bundled with scikit-learn" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_needs_no_other_file_and_shows_every_name_as_text(trained, photos, tmp_path):
    assert run(trained / "plain.onnx", "--data-dir", photos, "--out", tmp_path) == 0
    text = (tmp_path / "report.html").read_text()
    page = Tags(text)
    sources = [value for _, attrs in page.found for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert len(sources) >= 2
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    for label in LABELS:
        assert label in page.text
    report = json.loads((tmp_path / "report.json").read_text())
    shown = [attrs for tag, attrs in page.found if tag == "img" and "loading" in attrs]
    assert len(shown) == len(report["mistakes"]) > 0
    for mistake in report["mistakes"]:
        assert mistake["image"] in page.text


@pytest.mark.slow
def test_unreadable_images_are_named_and_in_no_figure(trained, photos, tmp_path, capsys):
    name = next(iter(json.loads((trained / FILE).read_text())["test"]))
    size = (photos / name).stat().st_size
    (photos / name).write_bytes(b"x" * size)
    assert run(trained / "plain.onnx", "--data-dir", photos, "--out", tmp_path) == 1
    output = capsys.readouterr().out
    assert f"not answered: {name}: not a PNG" in output
    assert "1 images could not be read and are in no figure" in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["unreadable"]) == [name]
    assert report["images"]["num"] == len(json.loads((trained / FILE).read_text())["test"]) - 1
    assert "1 more could not be read" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_somebody_elses_net_is_judged_on_the_whole_folder(write_foreign, photos, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["c", "other", *LABELS[:2]]))
    model = write_foreign(matrix=np.diag([1, 2, 3, 4])[:3])  # always answers the blue channel: class 2
    (photos / "c" / "damaged.png").write_bytes(b"no image")
    (photos / "c" / "notes.txt").write_bytes(b"no image")
    assert run(model, "--data-dir", photos, "--labels", names, "--out", tmp_path) == 1
    output = capsys.readouterr().out
    assert "on 30 images, all of the folder; no record says whether the model was trained on them" in output
    assert "labels by the command line" in output
    assert f"left out, not one of {', '.join(SUFFIXES)}: 1, first " in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["images"] for row in report["classes"]] == [10, 0, 10, 10]
    assert report["classes"][1]["recall"]["value"] is None
    assert list(report["unreadable"]) == [str(photos / "c" / "damaged.png")]
    root = tmp_path / "parts"
    for part in ("train", "test"):
        shutil.copytree(photos, root / part)
        (root / part / "c" / "damaged.png").unlink()
    shutil.rmtree(root / "test" / "c")
    assert run(model, "--data-dir", root, "--labels", names, "--out", tmp_path) == 0
    assert "on 20 images in its test folder; no record" in capsys.readouterr().out


def test_labels_that_do_not_fit_are_refused(write_foreign, photos, tmp_path, digits_net, capsys):
    model = write_foreign(num_classes=3)
    assert run(model, "--data-dir", photos) == 2
    assert "its labels are class 0, class 1, class 2: name its labels with --labels" in capsys.readouterr().err
    assert run(digits_net, "--dataset", "folder", "--data-dir", photos) == 2
    assert "judge it on images of its own classes" in capsys.readouterr().err
    assert run(digits_net, "--dataset", "folder") == 2
    assert "--dataset folder needs --data-dir" in capsys.readouterr().err
    assert run(model) == 2
    assert "does not say what it was trained on" in capsys.readouterr().err
    assert run(model, "--dataset", "digits") == 2
    assert "digits has images of shape (8, 8, 1), the net takes " in capsys.readouterr().err


@pytest.mark.slow
def test_a_net_of_numbers_is_judged_on_a_data_set_by_number(write_foreign, tmp_path):
    model = write_foreign(shape=("N", 1, 8, 8), matrix=np.arange(10)[None], num_classes=10)
    assert run(model, "--dataset", "digits", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    counts = np.bincount(datasets.load("digits").test.targets)
    assert np.array(report["confusion"])[:, 9].tolist() == counts.tolist()


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed here")
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_a_phone_and_a_screen(width, trained, photos, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    assert run(trained / "plain.onnx", "--data-dir", photos, "--out", tmp_path) == 0
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get((tmp_path / "report.html").as_uri())
        inner, seen, whole = browser.execute_script(
            "const page = document.documentElement; return [innerWidth, page.clientWidth, page.scrollWidth]"
        )
        assert (inner, whole) == (width, seen)  # nothing but tables and figures scrolls sideways
        browser.execute_script("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
        decoded = browser.execute_async_script(
            "const done = arguments[0];"
            "Promise.all([...document.images].map(image => image.decode())).then(() => done('all'), done)"
        )
        assert decoded == "all"
    finally:
        browser.quit()
