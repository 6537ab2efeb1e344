"""python train/experiments/convergence.py: plain, Dirac and residual nets of equal size (section 3.2, Fig. 3a)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments import lab

NETS = ("plain", "Dirac", "residual")
EXAMPLES = (
    "python train/experiments/convergence.py --depth 34 --epochs 20",
    "python train/experiments/convergence.py --paper --data-dir data --device cuda",
)


@dataclass(frozen=True)
class ConvergenceConfig(lab.ExperimentConfig):
    depth: Annotated[int, "6N + 4 layers"] = 34
    seeds: Annotated[int, "how often each net is trained; the figure shows the mean"] = 3


def command(config: ConvergenceConfig) -> int:
    """Training and validation error over epochs for the three kinds of net."""
    from train.data.datasets import info_of
    from train.families import count_parameters

    settings = config.training()
    widths = {"residual": _width_of_equal_size(config, info_of(settings.dataset))}
    cases = [lab.Case(net, {"net": net}, {"width": widths.get(net, settings.width), **lab.KINDS[net]}) for net in NETS]

    def rows_of(trials: list[lab.Trial]) -> list[lab.JsonRow]:
        return [trial.row(parameters=count_parameters(trial.net), history=trial.history) for trial in trials]

    return lab.conduct(config, "convergence", cases, _draw, rows_of)


def _draw(config: ConvergenceConfig, rows: list[lab.JsonRow]):
    """The mean over seeds as a line, from the best to the worst seed as a band."""
    import numpy as np

    figure, all_axes = lab.new_figure(2, height=4.4, sharey=True)
    for axes, part, images in zip(all_axes, ("train", "validation"), ("training", "held-out"), strict=True):
        for name, style in zip(NETS, ("-", "-", "--"), strict=True):
            of_net = [row for row in rows if row["net"] == name]
            accuracies = np.array([[epoch[f"{part}_accuracy"] for epoch in row["history"]] for row in of_net])
            errors, epochs = 100 * (1 - accuracies), np.arange(1, accuracies.shape[1] + 1)
            label, colour = f"{name}, {of_net[0]['parameters']:,} parameters", lab.COLOURS[name]
            axes.fill_between(epochs, errors.min(0), errors.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.plot(epochs, errors.mean(0), f".{style}", color=colour, label=label)
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.set(ylim=(0, 100), xlabel="epoch", title=f"{images} images")
        axes.set_yticks(ticks := (0, 1, 2, 5, 10, 20, 50, 100), [str(tick) for tick in ticks])
        axes.minorticks_off()
        lab.draw_chance(axes, config, error=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    all_axes[0].set_ylabel("error, %")
    figure.suptitle(f"{config.depth} layers, {config.title()}")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _width_of_equal_size(config: ConvergenceConfig, info) -> float:
    """The width at which the residual net's number of parameters is nearest to the Dirac net's.

    It is about sqrt(2) times as wide: without NCReLU its convolutions have half the weights.
    """
    from train.families import count_parameters, outline

    def size(name: str, width: float) -> int:
        return count_parameters(outline(config.training(width=width, **lab.KINDS[name]).spec(info.image, info.labels)))

    width = config.training().width
    wanted = size("Dirac", width)
    widths = [channels / 16 for channels in range(1, int(32 * width) + 1)]
    return min(widths, key=lambda residual: abs(size("residual", residual) - wanted))


if __name__ == "__main__":
    sys.exit(run_command(command, ConvergenceConfig, examples=EXAMPLES))
