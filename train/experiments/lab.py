"""The laboratory of the experiments: nets trained in memory, case by case, and the figures and numbers they leave."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
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

JsonRow = dict[str, Any]  # of NAME.json
Hook = Callable[["nn.Sequential"], Any]  # takes a net in training
# The paper's recipe in small: minutes on two cores. W's deviation is that of the authors' code, the start of the rest
# PyTorch's.
CHEAP = {"dataset": "digits", "width": 0.25, "epochs": 10, "batch_size": 32, "w_std": 0.1, "start": "pytorch"}
# One colour for one kind of net, in all figures.
COLOURS = {"Dirac": "C0", "initialised": "C3", "plain": "C1", "residual": "C2", "residual with δ": "C4"}
COLOURS |= {"ncrelu": "C0", "relu": "C5"}
# The kinds of net that are compared, by what they are called in figures and numbers, in alphabetical order.
KINDS = {
    "Dirac": {"parameterization": "dirac"},
    "initialised": {"parameterization": "initialised"},
    "plain": {"parameterization": "plain"},
    "residual": {"family": "wrn"},
}
PAPER = {"dataset": "cifar10", "width": 1.0}
HISTORY = ("train_loss", "train_accuracy", "validation_accuracy")
SAME = ("dataset", "epochs", "batch_size", "momentum", "weight_decay", "schedule", "a0", "b0", "w_std")  # to go on


@dataclass(frozen=True)
class ExperimentConfig:
    """The options of all experiments; None means the cheap value, or the paper's."""

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
        options = {name: getattr(self, name, None) for name in ("dataset", "width", "epochs", "depth")}
        given = {name: value for name, value in options.items() if value is not None}
        config = TrainConfig(recipe="paper", data_dir=self.data_dir, device=self.device, validation=0.1)
        return replace(config, **((PAPER if self.paper else CHEAP) | given | fields)).resolved()

    def title(self) -> str:
        """The part of a plot's title that all experiments share."""
        settings = self.training()
        counts = ((settings.epochs, "epoch"), (self.seeds, "seed"))
        return ", ".join([settings.dataset, *(f"{num} {noun}{'s' * (num != 1)}" for num, noun in counts)])


@dataclass(frozen=True)
class DeepConfig(ExperimentConfig):
    """An experiment on nets of one depth, which is the paper's only with `paper`."""

    depth: Annotated[int | None, "6N + 4 layers (cheap: 34; paper: 100)"] = None

    def training(self, **fields: Any) -> Settings:
        return super().training(**{"depth": self.depth or (100 if self.paper else 34)} | fields)


@dataclass(frozen=True)
class Case:
    """One kind of net, to be trained with every seed."""

    name: str  # in lines of text
    key: dict[str, Any]  # what identifies its rows in the numbers
    settings: dict[str, Any]
    prepare: Hook = lambda net: None  # what changes the net before its first step


@dataclass(frozen=True)
class Trial:
    seed: int
    net: "nn.Sequential"
    history: list[dict[str, float]]  # per epoch: training loss and accuracy, validation accuracy
    test_accuracy: float  # read once, at the end
    observed: list[Any] = field(default_factory=list)  # of the net before the first and after each epoch

    def row(self, **figures: Any) -> JsonRow:
        return {"seed": self.seed, "test_accuracy": self.test_accuracy, **figures}


def accuracies(trials: Sequence[Trial], **figures: Any) -> list[JsonRow]:
    """One row for all seeds: `figures`, test accuracies, their mean and spread."""
    each = [trial.test_accuracy for trial in trials]
    mean, spread = mean_and_spread(each)
    return [{**figures, "accuracies": each, "mean": mean, "spread": spread}]


def conduct(
    config: ExperimentConfig,
    name: str,
    cases: Sequence[Case],
    draw: Callable[[Any, list[JsonRow]], "Figure"],
    rows_of: Callable[[list[Trial]], list[JsonRow]] = accuracies,
    *,
    observe: Hook = lambda net: None,
    resume: bool = False,
    order: Sequence[str] = (),
) -> int:
    """Train every case with every seed, and write NAME.json and NAME.png; or draw NAME.json again.

    A case has the rows that `rows_of` makes of its trials, with its key. They are sorted by the fields named in `order`
    and written after each case; with `resume`, cases that NAME.json holds are not measured again.
    """
    rows = _recorded(config, name)["rows"] if config.redraw else _kept_rows(config, name) if resume else []
    lacking = [case for case in cases if not config.redraw and not any(case.key.items() <= row.items() for row in rows)]
    dataset = None
    with progress(make_console(), "training", len(lacking) * config.seeds) as advance:
        for case in lacking:
            dataset, trials = dataset or load_dataset(config), list[Trial]()
            for seed in range(config.seeds):
                settings = config.training(**case.settings, seed=seed)
                trials.append(run_trial(settings, dataset, prepare=case.prepare, observe=observe))
                advance(note=f"{case.name}: {100 * trials[-1].test_accuracy:.1f} %")
            rows = [*rows, *({**case.key, **row} for row in rows_of(trials))]
            rows.sort(key=lambda row: [row[field] for field in order])
            write_numbers(config.out, name, {"settings": config.training(), "rows": rows})
            mean, spread = mean_and_spread([trial.test_accuracy for trial in trials])
            print(f"{case.name}: {100 * mean:.1f} ± {100 * spread:.1f} %")
    numbers = {"settings": config.training(), "rows": rows}
    write_results(config.out, name, draw(config, rows), numbers, redraw=config.redraw)
    return 0


def run_trial(
    config: Settings, dataset: "Dataset", *, prepare: Hook = lambda net: None, observe: Hook = lambda net: None
) -> Trial:
    """Train one net, without files. `prepare` may change it before the first step."""
    from train.data.datasets import divide
    from train.machine import World, choose_device
    from train.trainer import Trainer, evaluate

    world, spec = World(device=choose_device(config.device)), config.spec(dataset.info.image, dataset.info.labels)
    trainer = Trainer(config, spec, divide(dataset, config.validation, seed=0), world, make_console(quiet=True))
    prepare(trainer.net)
    observed = [observe(trainer.net)]
    for _ in range(config.epochs):
        trainer.epoch()
        observed.append(observe(trainer.net))
    accuracy = evaluate(trainer.net, dataset.test, device=world.device).accuracy
    history = [{key: row[key] for key in HISTORY} for row in trainer.history]
    return Trial(config.seed, trainer.net, history, accuracy, observed)


def load_dataset(config: ExperimentConfig) -> "Dataset":
    from train.data import datasets

    return datasets.load(config.training().dataset, data_dir=config.data_dir)


def grid(kinds: Sequence[str], depths: Sequence[int], option: str, values: Sequence[float]) -> list[Case]:
    """Nets of some of the KINDS, in several depths and with several values of one more option."""
    return [
        Case(
            f"{kind}-{depth}, {option} {value:g}",
            {"kind": kind, "depth": depth, option: value},
            {"depth": depth, option: value, **KINDS[kind]},
        )
        for depth, kind, value in product(depths, kinds, values)
    ]


def _kept_rows(config: ExperimentConfig, name: str) -> list[JsonRow]:
    """The rows of NAME.json in --out, to go on with; refuses those of other settings."""
    path = config.out / f"{name}.json"
    if not path.exists():
        return []
    record, now = _recorded(config, name), asdict(config.training())
    other = [key for key, value in record["settings"].items() if key in SAME and now[key] != value]
    if other or any(len(row["accuracies"]) != config.seeds for row in record["rows"]):
        what = ", ".join(f"{key} {record['settings'][key]}" for key in other) or "another number of seeds"
        raise Refusal(f"{path} was measured with {what}: name another folder with --out, or leave --resume out")
    return record["rows"]


def _recorded(config: ExperimentConfig, name: str) -> dict[str, Any]:
    return json.loads(read_whole(config.out / f"{name}.json"))


def draw_accuracies(axes: Any, places: list[float], rows: list[JsonRow], **style: Any) -> None:
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
    text = json.dumps(numbers, indent=1, default=lambda item: asdict(item) if isinstance(item, Settings) else str(item))
    write_whole(out / f"{name}.json", f"{text}\n".encode())


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single value)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def new_figure(num_columns: int, *, height: float = 3.8, sharey: bool = False) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * num_columns, height), layout="constrained")
    return figure, list(figure.subplots(1, num_columns, sharey=sharey, squeeze=False)[0])
