"""Each experiment in its smallest form: it ends, and leaves a figure and numbers that say what was run."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

from common.cli import run_command
from train.data import datasets
from train.experiments import lab, parameterization
from train.experiments.convergence import ConvergenceConfig, _width_of_equal_size
from train.experiments.lab import ExperimentConfig, mean_and_spread
from train.experiments.sparsity import measure

SMALL = ["--epochs", "1", "--seeds", "1", "--width", "0.0625"]
RUNS = {
    "depth": ["--depths", "10", "16", *SMALL],
    "scaling": ["--depth", "10", *SMALL],
    "sparsity": ["--depth", "10", *SMALL],
    "convergence": ["--depth", "10", *SMALL],
    "parameterization": ["--depths", "10", "--lrs", "0.1", "0.5", *SMALL],
    "initialization": ["--depth", "10", "--sigmas", "0", "1e-2", *SMALL],
    "delta": [],
}


def run(name, out, *argv):
    module = importlib.import_module(f"train.experiments.{name}")
    config = next(value for key, value in vars(module).items() if key == f"{name.capitalize()}Config")
    status = run_command(module.command, config, argv=[*argv, "--out", str(out)])
    assert status == 0
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_experiment_leaves_its_figure_and_its_numbers(name, tmp_path):
    numbers = run(name, tmp_path, *RUNS[name])
    with Image.open(tmp_path / f"{name}.png") as figure:
        assert np.asarray(figure.convert("L")).std() > 5  # not blank
    if name == "delta":
        assert numbers["ones"] == [[i, i % 16, 1, 1] for i in range(32)]  # eq. 8
        return
    figure, record = ((tmp_path / f"{name}.{kind}").read_bytes() for kind in ("png", "json"))
    (tmp_path / f"{name}.png").unlink()
    assert run(name, tmp_path, "--redraw", *RUNS[name]) == numbers
    assert ((tmp_path / f"{name}.png").read_bytes(), (tmp_path / f"{name}.json").read_bytes()) == (figure, record)
    assert numbers["settings"]["epochs"] == 1
    assert all(np.isfinite(row.get("test_accuracy", row.get("mean"))) for row in numbers["rows"])


@pytest.mark.slow
def test_scaling_starts_where_it_says(tmp_path):
    for row in run("scaling", tmp_path, *RUNS["scaling"])["rows"]:
        assert set(row["a"][0]) == {float(row["start"][0])}
        assert row["a"][1] != row["a"][0]


def test_the_cheap_and_the_papers_settings():
    cheap = ExperimentConfig().training()
    assert (cheap.dataset, cheap.width, cheap.epochs, cheap.a0, cheap.schedule) == ("digits", 0.25, 10, 5.0, "wrn")
    paper = ExperimentConfig(paper=True).training(depth=34)
    assert (paper.dataset, paper.width, paper.epochs, paper.batch_size) == ("cifar10", 1.0, 200, 128)
    assert (paper.lr, paper.weight_decay, paper.w_std, paper.depth) == (0.1, 5e-4, 1.0, 34)
    assert ExperimentConfig(epochs=3).training().epochs == 3


PAPER_DEPTH = {"depth": 10, "scaling": 100, "sparsity": 100, "convergence": 34, "initialization": 28} | {
    "parameterization": 34
}


@pytest.mark.parametrize("name", PAPER_DEPTH)
def test_the_papers_settings_reach_the_training(name, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def see(settings, dataset, **_):
        raise Seen(settings)

    monkeypatch.setattr(lab, "run_trial", see)
    monkeypatch.setattr(lab, "load_dataset", lambda config: datasets.load("digits"))
    with pytest.raises(Seen) as seen:
        run(name, tmp_path, "--paper")
    (settings,) = seen.value.args
    assert (settings.dataset, settings.epochs, settings.width, settings.w_std) == ("cifar10", 200, 1.0, 1.0)
    assert settings.depth == PAPER_DEPTH[name]


@pytest.mark.slow
def test_depth_has_mean_and_spread_of_every_kind_depth_and_width(tmp_path):
    argv = ["--epochs", "1", "--seeds", "2", "--depths", "10", "--widths", "0.0625", "0.125"]
    rows = run("depth", tmp_path, *argv)["rows"]
    cases = [(row["kind"], row["width"]) for row in rows]
    assert cases == [
        (kind, width) for kind in ("Dirac", "initialised", "plain", "residual") for width in (0.0625, 0.125)
    ]
    for row in rows:
        assert len(set(row["accuracies"])) == 2
        assert (row["mean"], row["spread"]) == mean_and_spread(row["accuracies"])


@pytest.mark.slow
def test_an_experiment_goes_on_with_what_it_has_and_never_with_other_settings(tmp_path, monkeypatch, capsys):
    argv = ["--depths", "10", *SMALL]
    whole = run("parameterization", tmp_path, *argv, "--lrs", "0.1", "0.5")
    assert [(row["kind"], row["lr"]) for row in whole["rows"]] == [
        (kind, lr) for kind in ("Dirac", "initialised", "plain") for lr in (0.1, 0.5)
    ]
    path = tmp_path / "parameterization.json"
    path.write_text(json.dumps(whole | {"rows": [row for row in whole["rows"] if row["kind"] != "initialised"]}))
    trained, run_trial = [], lab.run_trial

    def counted(settings, dataset, **hooks):
        trained.append((settings.parameterization, settings.lr))
        return run_trial(settings, dataset, **hooks)

    monkeypatch.setattr(lab, "run_trial", counted)
    assert run("parameterization", tmp_path, *argv, "--lrs", "0.1", "0.5", "--resume") == whole
    assert trained == [("initialised", 0.1), ("initialised", 0.5)]
    for other in (["--epochs", "2"], ["--seeds", "2"]):
        config = [*argv, *other, "--resume", "--out", str(tmp_path)]
        assert run_command(parameterization.command, parameterization.ParameterizationConfig, argv=config) == 2
        assert "name another folder with --out, or leave --resume out" in " ".join(capsys.readouterr().err.split())
    assert json.loads(path.read_text()) == whole


def test_the_residual_net_of_the_convergence_has_as_many_parameters(tmp_path):
    info = datasets.info_of("cifar10")
    config = ConvergenceConfig(paper=True)
    width = _width_of_equal_size(config, info)
    assert width == pytest.approx(2**0.5, rel=0.05)


def test_kurtosis_and_dead_rows_are_counted_right():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(32, 64, 3, 3))
    assert measure([weights])["kurtosis"] == pytest.approx(3, abs=0.1)
    assert measure([weights])["dead_rows"] == 0
    weights[2] = 0  # one filter of 32, ...
    weights[:, 5:8] = 0  # ... three inputs of 64
    assert measure([weights])["dead_rows"] == 4 / 96


@pytest.mark.slow
def test_a_net_that_diverges_is_a_result():
    settings = ExperimentConfig(epochs=1, width=0.0625).training(depth=10, lr=1e30)
    trial = lab.run_trial(settings, datasets.load("digits"))
    assert not np.isfinite(trial.history[0]["train_loss"])
    assert trial.test_accuracy < 0.5


def test_mean_and_spread():
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_spread([0.5]) == (0.5, 0.0)
