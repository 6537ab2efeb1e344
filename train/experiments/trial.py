"""One training of an experiment: in memory, no files; and what experiments leave behind."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    """What all experiments have in common; None stands for the cheap or the paper's value."""

    paper: Annotated[bool, "the paper's settings: CIFAR-10, 200 epochs, full width; days without a GPU"] = False
    dataset: Annotated[Published | None, "what to learn"] = None
    data_dir: Annotated[Path | None, "where the data set lies"] = None
    width: Annotated[float | None, "width factor k of Table 1 (cheap: 0.25)"] = None
    epochs: Annotated[int | None, "passes over the training images (cheap: 10)"] = None
    seeds: Annotated[int, "how often each net is trained"] = 3
    device: Annotated[Literal["auto", "cpu", "cuda"], "where to train"] = "auto"
    out: Annotated[Path, "folder for the figure and the numbers"] = Path("runs/experiments")
    redraw: Annotated[bool, "train nothing: draw the figure again from the numbers in --out"] = False

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


@dataclass(frozen=True)
class Trial:
    net: "nn.Sequential"
    history: list[dict[str, float]]  # per epoch: training loss and accuracy, validation accuracy
    test_accuracy: float  # read once, at the end


def run_trial(
    config: Settings,
    dataset: "Dataset",
    *,
    prepare: Callable[["nn.Sequential"], None] = lambda net: None,
    observe: Callable[["nn.Sequential"], None] = lambda net: None,
) -> Trial:
    """Train one net. `prepare` may change it before the first step; `observe` sees it before and after each epoch."""
    from common.progress import make_console
    from train.data.datasets import divide
    from train.distributed import World
    from train.loop import evaluate
    from train.machine import choose_device
    from train.trainer import Trainer

    world, spec = World(device=choose_device(config.device)), config.spec(dataset.info.image, dataset.info.labels)
    trainer = Trainer(config, spec, divide(dataset, config.validation, seed=0), world, make_console(quiet=True))
    prepare(trainer.net)
    observe(trainer.net)
    for _ in range(config.epochs):
        trainer.epoch()
        observe(trainer.net)
    history = [{key: row[key] for key in HISTORY} for row in trainer.history]
    return Trial(trainer.net, history, evaluate(trainer.net, dataset.test, device=world.device).accuracy)


def describe(config: ExperimentConfig) -> str:
    """The part of a plot's title that all experiments share."""
    settings = config.training()
    return f"{settings.dataset}, {plural(settings.epochs, 'epoch')}, {plural(config.seeds, 'seed')}"


def plural(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"


def load_dataset(config: ExperimentConfig) -> "Dataset":
    from train.data import datasets

    return datasets.load(config.training().dataset, data_dir=config.data_dir)


def recorded_rows(config: ExperimentConfig, name: str) -> list[dict[str, Any]]:
    """The rows of NAME.json, where the figure alone is made again."""
    from common.files import read_whole

    return json.loads(read_whole(config.out / f"{name}.json"))["rows"]


def kept_rows(config: ExperimentConfig, name: str, settings: Settings) -> list[dict[str, Any]]:
    """The rows of NAME.json in --out, to go on with; refuses those of other settings."""
    from common.files import read_whole

    path = config.out / f"{name}.json"
    if not path.exists():
        return []
    record, now = json.loads(read_whole(path)), asdict(settings)
    other = [key for key, value in record["settings"].items() if key in SAME and now[key] != value]
    if other or any(len(row["accuracies"]) != config.seeds for row in record["rows"]):
        what = ", ".join(f"{key} {record['settings'][key]}" for key in other) or "another number of seeds"
        raise Refusal(f"{path} was measured with {what}: name another folder with --out, or leave --resume out")
    return record["rows"]


def draw_chance(axes: Any, config: ExperimentConfig, *, error: bool = False) -> None:
    """The accuracy, or error, in per cent of a net that knows nothing."""
    from train.data import datasets

    chance = 100 / len(datasets.info_of(config.training().dataset).labels)
    axes.axhline(100 - chance if error else chance, color="0.5", linestyle=":", label="chance")


def write_results(out: Path, name: str, figure: "Figure", numbers: dict[str, Any], *, redraw: bool = False) -> None:
    """NAME.png and NAME.json in `out`; the picture alone where it is drawn again."""
    from common.figure import png
    from common.files import write_whole

    write_whole(out / f"{name}.png", png(figure))
    if redraw:
        print(f"wrote {out / name}.png")
        return
    write_numbers(out, name, numbers)
    print(f"wrote {out / name}.png and .json")


def write_numbers(out: Path, name: str, numbers: dict[str, Any]) -> None:
    """NAME.json in `out`."""
    from common.files import write_whole

    text = json.dumps(
        numbers, indent=1, default=lambda value: asdict(value) if isinstance(value, Settings) else str(value)
    )
    write_whole(out / f"{name}.json", f"{text}\n".encode())


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single value)."""
    import numpy as np

    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def new_figure(num_columns: int, *, height: float = 3.8, sharey: bool = False) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * num_columns, height), layout="constrained")
    return figure, list(figure.subplots(1, num_columns, sharey=sharey, squeeze=False)[0])
