"""python train/experiments/initialization.py: residual nets with δ + W from any W (section 3.6, eq. 14)."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments import lab

SIGMAS = (0.0, 1e-8, 1e-4, 1e-2, 1e-1, 1.0)
EXAMPLES = (
    "python train/experiments/initialization.py --sigmas 1e-8 1e-2 --seeds 1",
    "python train/experiments/initialization.py --paper --data-dir data --device cuda",
)


@dataclass(frozen=True)
class InitializationConfig(lab.ExperimentConfig):
    depth: Annotated[int, "6N + 4; the paper has 28"] = 28
    sigmas: Annotated[tuple[float, ...], "standard deviations of W ~ N(0, σ²) at the start"] = SIGMAS


def command(config: InitializationConfig) -> int:
    """Wide ResNet with δ + W and with W alone, all convolutions drawn from N(0, σ²)."""
    drawn = [(kind, sigma, "convolutions") for kind in ("delta", "plain") for sigma in config.sigmas]
    cases = [
        lab.Case(
            f"{'δ + W' if kind == 'delta' else 'W'}, σ = {sigma:g}, {what}",
            {"kind": kind, "sigma": sigma, "drawn": what},
            # Wide ResNet's stem has 16 channels
            {"width": config.width or 1.0, "family": "wrn", "parameterization": kind},
            partial(_draw_weights, sigma=sigma, classifier=what == "all weights"),
        )
        for kind, sigma, what in [*drawn, ("delta", 0.0, "all weights")]
    ]
    return lab.conduct(config, "initialization", cases, _draw)


def _draw_weights(net, *, sigma: float, classifier: bool) -> None:
    """All convolutions from N(0, σ²); the `classifier` all zeros too."""
    from torch import nn

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=sigma)
        elif isinstance(layer, nn.Linear) and classifier:
            nn.init.zeros_(layer.weight)


def _draw(config: InitializationConfig, rows: list[lab.JsonRow]):
    """A line for each kind, side by side, so that none hides another."""
    figure, (axes,) = lab.new_figure(1, height=4.4)
    smallest = min((row["sigma"] for row in rows if row["sigma"]), default=1.0)
    kinds = (("delta", "δ + W (eq. 14)", "residual with δ", 1), ("plain", "W", "residual", -1))
    for kind, label, net, side in kinds:
        of_kind = [row for row in rows if row["kind"] == kind and row["drawn"] == "convolutions"]
        places = [row["sigma"] * 1.5**side if row["sigma"] else 0.1 * side * smallest for row in of_kind]
        lab.draw_accuracies(axes, places, of_kind, marker="o", color=lab.COLOURS[net], label=label)
    axes.plot([0], [100 * rows[-1]["mean"]], "kx", markersize=9, zorder=3, label="all weights zero")
    axes.set_xscale("symlog", linthresh=smallest, linscale=1)
    lab.draw_chance(axes, config)
    axes.set(xlabel="σ", ylabel="test accuracy, %", ylim=(0, 103), title=f"ResNet-{config.depth}, {config.title()}")
    axes.legend(loc="center right")
    return figure


if __name__ == "__main__":
    sys.exit(run_command(command, InitializationConfig, examples=EXAMPLES))
