"""python train/experiments/parameterization.py: what eq. 4 brings beyond its start, over learning rates."""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments import lab

KINDS = ("Dirac", "initialised", "plain")
EXAMPLES = (
    "python train/experiments/parameterization.py --depths 34 --lrs 0.05 0.1 --seeds 1",
    "python train/experiments/parameterization.py --dataset fashion-mnist --depths 16 --width 1 --epochs 4",
    "python train/experiments/parameterization.py --paper --data-dir data --device cuda",
)


@dataclass(frozen=True)
class ParameterizationConfig(lab.ExperimentConfig):
    depths: Annotated[tuple[int, ...], "6N + 4 each"] = (34,)
    resume: Annotated[bool, "train only what the numbers in --out lack; they are written after each case"] = False
    lrs: Annotated[tuple[float, ...], "learning rates at the start"] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def command(config: ParameterizationConfig) -> int:
    """Train Dirac nets, ordinary ones that start as the same function, and ordinary ones that start as He's normal.

    All are of one shape, with NCReLU and without skip connections; each is given every learning rate.
    """

    def rows_of(trials: list[lab.Trial]) -> list[lab.JsonRow]:
        validated = fmean(trial.history[-1]["validation_accuracy"] for trial in trials)
        return lab.accuracies(trials, validation_accuracy=validated)

    cases, order = lab.grid(KINDS, config.depths, "lr", config.lrs), ("depth", "kind", "lr")
    return lab.conduct(config, "parameterization", cases, _draw, rows_of, resume=config.resume, order=order)


def _draw(config: ParameterizationConfig, rows: list[lab.JsonRow]):
    """A line for each kind, side by side, so that none hides another."""
    depths, lrs = (sorted({row[key] for row in rows}) for key in ("depth", "lr"))
    figure, all_axes = lab.new_figure(len(depths), height=4.4, sharey=True)
    for axes, depth in zip(all_axes, depths, strict=True):
        for index, kind in enumerate(KINDS):
            line = [row for row in rows if (row["depth"], row["kind"]) == (depth, kind)]
            places = [row["lr"] * 1.04 ** (index - 1) for row in line]
            lab.draw_accuracies(axes, places, line, marker="o", color=lab.COLOURS[kind], label=kind)
        lab.draw_chance(axes, config)
        axes.set(title=f"{depth} layers, {config.title()}", xlabel="learning rate", xscale="log")
        axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        axes.minorticks_off()
    all_axes[0].set(ylabel="test accuracy, %", ylim=(0, 103))
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS) + 1)
    return figure


if __name__ == "__main__":
    sys.exit(run_command(command, ParameterizationConfig, examples=EXAMPLES))
