"""The laboratory of the experiments: nets trained in memory, case by case, and the figures and numbers they leave."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any, Literal

from common.files import read_whole, write_whole
from common.progress import make_console, progress
from common.refusal import Refusal
from common.spec import Published
from train.config import Settings, TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from train.data.datasets import Dataset

# The paper's recipe in small: minutes on two cores. W's deviation is that of the authors' code, the start of the rest
# PyTorch's.
CHEAP = {"dataset": "digits", "width": 0.25, "epochs": 10, "batch_size": 32, "w_std": 0.1, "start": "pytorch"}
# One colour for one kind of net, in all figures.
COLOURS = {
    "Dirac": "C0",
    "initialised": "C3",
    "plain": "C1",
    "residual": "C2",
    "residual with δ": "C4",
    "ncrelu": "C0",
    "relu": "C5",
}
PAPER = {"dataset": "cifar10", "width": 1.0}
HISTORY = ("train_loss", "train_accuracy", "validation_accuracy")
SAME = ("dataset", "epochs", "batch_size", "momentum", "weight_decay", "schedule", "a0", "b0", "w_std")  # to go on


@dataclass(frozen=True)
class ExperimentConfig:
    """What all experiments have in common; None means the cheap or the paper's value."""

    paper: Annotated[bool, "the paper's settings: CIFAR-10, 200 epochs, full width; days without a GPU"] = False
    dataset: Annotated[Published | None, "data set to train on"] = None
    data_dir: Annotated[Path | None, "folder of the data set"] = None
    width: Annotated[float | None, "width factor k of Table 1 (cheap: 0.25)"] = None
    epochs: Annotated[int | None, "passes over the training images (cheap: 10)"] = None
    seeds: Annotated[int, "how often each net is trained"] = 3
    device: Annotated[Literal["auto", "cpu", "cuda"], "device to train on"] = "auto"
    out: Annotated[Path, "folder for the figure and the numbers"] = Path("runs/experiments")
    redraw: Annotated[bool, "draw the figure again from the numbers in --out, without training"] = False

    def __post_init__(self) -> None:
        if self.seeds < 1 or (self.epochs or 1) < 1:
            raise Refusal("--seeds and --epochs must be at least 1")

    def training(self, **fields: Any) -> Settings:
        """The settings of one training in this experiment."""
        given = {
            name: getattr(self, name) for name in ("dataset", "width", "epochs") if getattr(self, name) is not None
        }
        common = (PAPER if self.paper else CHEAP) | given
        config = TrainConfig(recipe="paper", data_dir=self.data_dir, device=self.device, validation=0.1)
        return replace(config, **(common | fields)).resolved()

    def title(self) -> str:
        """The part of a plot's title that all experiments share."""
        settings = self.training()
        return f"{settings.dataset}, {_plural(settings.epochs, 'epoch')}, {_plural(self.seeds, 'seed')}"


@dataclass(frozen=True)
class Case:
    """One kind of net, to be trained with every seed."""

    name: str  # in lines of text
    key: dict[str, Any]  # what identifies its rows in the numbers
    settings: dict[str, Any]
    prepare: "Callable[[nn.Sequential], None]" = lambda net: None  # what changes the net before its first step


@dataclass(frozen=True)
class Trial:
    net: "nn.Sequential"
    history: list[dict[str, float]]  # per epoch: training loss and accuracy, validation accuracy
    test_accuracy: float  # read once, at the end
    observed: list[Any] = field(default_factory=list)  # of the net before the first and after each epoch


def run_trial(
    config: Settings,
    dataset: "Dataset",
    *,
    prepare: Callable[["nn.Sequential"], None] = lambda net: None,
    observe: Callable[["nn.Sequential"], Any] = lambda net: None,
) -> Trial:
    """Train one net, without files. `prepare` may change it before the first step."""
    from train.data.datasets import divide
    from train.distributed import World
    from train.loop import evaluate
    from train.machine import choose_device
    from train.trainer import Trainer

    world, spec = World(device=choose_device(config.device)), config.spec(dataset.info.image, dataset.info.labels)
    trainer = Trainer(config, spec, divide(dataset, config.validation, seed=0), world, make_console(quiet=True))
    prepare(trainer.net)
    observed = [observe(trainer.net)]
    for _ in range(config.epochs):
        trainer.epoch()
        observed.append(observe(trainer.net))
    accuracy = evaluate(trainer.net, dataset.test, device=world.device).accuracy
    history = [{key: row[key] for key in HISTORY} for row in trainer.history]
    return Trial(trainer.net, history, accuracy, observed)


def run_cases(
    config: ExperimentConfig, cases: Sequence[Case], observe: Callable[["nn.Sequential"], Any] = lambda net: None
) -> Iterator[tuple[Case, list[Trial]]]:
    """Train every case with every seed; gives the trials of each as soon as they are done."""
    dataset = load_dataset(config)
    with progress(make_console(), "training", len(cases) * config.seeds) as advance:
        for case in cases:
            trials = []
            for seed in range(config.seeds):
                settings = config.training(**case.settings, seed=seed)
                trials.append(run_trial(settings, dataset, prepare=case.prepare, observe=observe))
                advance(note=f"{case.name}: {100 * trials[-1].test_accuracy:.1f} %")
            yield case, trials


def measure_seeds(
    config: ExperimentConfig,
    cases: Sequence[Case],
    figures: Callable[[Trial, int], dict[str, Any]],
    observe: Callable[["nn.Sequential"], Any] = lambda net: None,
) -> list[dict[str, Any]]:
    """A row per case and seed: the case's key, the seed, the test accuracy and the `figures` of (trial, seed)."""
    rows = []
    for case, trials in run_cases(config, cases, observe):
        of_case = [
            {**case.key, "seed": seed, "test_accuracy": trial.test_accuracy, **figures(trial, seed)}
            for seed, trial in enumerate(trials)
        ]
        for name in (name for name, value in of_case[0].items() if isinstance(value, float)):
            mean, spread = mean_and_spread([row[name] for row in of_case])
            print(f"{case.name:12s} {name:13s} {mean:.4f} ± {spread:.4f}")
        rows += of_case
    return rows


def measure_accuracies(
    config: ExperimentConfig,
    name: str,
    cases: Sequence[Case],
    *,
    resume: bool = False,
    order: Callable[[dict[str, Any]], Any] = lambda row: 0,
    figures: Callable[[list[Trial]], dict[str, Any]] = lambda trials: {},
) -> list[dict[str, Any]]:
    """A row per case, in `order`: its key, test accuracies, their mean and spread, and more `figures` of its trials.

    The rows are written to NAME.json after each case; with `resume`, those that are there are not measured again.
    """
    rows = _kept_rows(config, name) if resume else []
    lacking = [case for case in cases if not any(case.key.items() <= row.items() for row in rows)]
    for case, trials in run_cases(config, lacking):
        accuracies = [trial.test_accuracy for trial in trials]
        mean, spread = mean_and_spread(accuracies)
        rows.append({**case.key, **figures(trials), "accuracies": accuracies, "mean": mean, "spread": spread})
        rows.sort(key=order)
        write_numbers(config.out, name, {"settings": config.training(), "rows": rows})
        print(f"{case.name}: {100 * mean:.1f} ± {100 * spread:.1f} %")
    return rows


def load_dataset(config: ExperimentConfig) -> "Dataset":
    from train.data import datasets

    return datasets.load(config.training().dataset, data_dir=config.data_dir)


def recorded_rows(config: ExperimentConfig, name: str) -> list[dict[str, Any]]:
    """The rows of NAME.json, where the figure alone is made again."""
    return json.loads(read_whole(config.out / f"{name}.json"))["rows"]


def _kept_rows(config: ExperimentConfig, name: str) -> list[dict[str, Any]]:
    """The rows of NAME.json in --out, to go on with; refuses those of other settings."""
    path = config.out / f"{name}.json"
    if not path.exists():
        return []
    record, now = json.loads(read_whole(path)), asdict(config.training())
    other = [key for key, value in record["settings"].items() if key in SAME and now[key] != value]
    if other or any(len(row["accuracies"]) != config.seeds for row in record["rows"]):
        what = ", ".join(f"{key} {record['settings'][key]}" for key in other) or "another number of seeds"
        raise Refusal(f"{path} was measured with {what}: name another folder with --out, or leave --resume out")
    return record["rows"]


def draw_accuracies(axes: Any, places: list[float], rows: list[dict[str, Any]], **style: Any) -> None:
    """Mean and spread of the test accuracy in per cent, as a line with error bars."""
    means, spreads = ([100 * row[key] for row in rows] for key in ("mean", "spread"))
    axes.errorbar(places, means, spreads, capsize=3, **style)


def draw_chance(axes: Any, config: ExperimentConfig, *, error: bool = False) -> None:
    """The accuracy, or error, in per cent of a net that knows nothing."""
    from train.data import datasets

    chance = 100 / len(datasets.info_of(config.training().dataset).labels)
    axes.axhline(100 - chance if error else chance, color="0.5", linestyle=":", label="chance")


def write_results(out: Path, name: str, figure: "Figure", numbers: dict[str, Any], *, redraw: bool = False) -> None:
    """NAME.png and NAME.json in `out`; the picture alone where it is drawn again."""
    from common.figure import png

    write_whole(out / f"{name}.png", png(figure))
    if not redraw:
        write_numbers(out, name, numbers)
    print(f"wrote {out / name}.png{'' if redraw else ' and .json'}")


def write_numbers(out: Path, name: str, numbers: dict[str, Any]) -> None:
    """NAME.json in `out`."""
    text = json.dumps(
        numbers, indent=1, default=lambda value: asdict(value) if isinstance(value, Settings) else str(value)
    )
    write_whole(out / f"{name}.json", f"{text}\n".encode())


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single value)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def new_figure(num_columns: int, *, height: float = 3.8, sharey: bool = False) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * num_columns, height), layout="constrained")
    return figure, list(figure.subplots(1, num_columns, sharey=sharey, squeeze=False)[0])


def _plural(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"
