"""python train/experiments/initialization.py: residual nets with δ + W from any W (section 3.6, eq. 14)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments.trial import ExperimentConfig

EXAMPLES = (
    "python train/experiments/initialization.py --sigmas 1e-8 1e-2 --seeds 1",
    "python train/experiments/initialization.py --paper --data-dir data --device cuda",
)


@dataclass(frozen=True)
class InitializationConfig(ExperimentConfig):
    depth: Annotated[int, "6N + 4; the paper has 28"] = 28
    sigmas: Annotated[tuple[float, ...], "standard deviations of W ~ N(0, σ²) at the start"] = (
        0.0,
        1e-8,
        1e-4,
        1e-2,
        1e-1,
        1.0,
    )


def command(config: InitializationConfig) -> int:
    """Wide ResNet with δ + W and with W alone, all convolutions from N(0, σ²) whatever their shape."""
    from train.experiments.trial import describe, draw_chance, new_figure, recorded_rows, write_results

    rows = recorded_rows(config, "initialization") if config.redraw else _measure(config)
    figure, (axes,) = new_figure(1, height=4.4)
    _draw(axes, rows)
    draw_chance(axes, config)
    axes.set(xlabel="σ", ylabel="test accuracy, %", ylim=(0, 103), title=f"ResNet-{config.depth}, {describe(config)}")
    axes.legend(loc="center right")
    numbers = {"settings": config.training(depth=config.depth), "rows": rows}
    write_results(config.out, "initialization", figure, numbers, redraw=config.redraw)
    return 0


def _measure(config: InitializationConfig) -> list[dict[str, Any]]:
    from torch import nn

    from common.progress import make_console, progress
    from train.experiments.trial import load_dataset, mean_and_spread, run_trial

    dataset, rows = load_dataset(config), []
    width = config.width or 1.0  # Wide ResNet's stem has 16 channels
    cases = [(kind, sigma, "convolutions") for kind in ("delta", "plain") for sigma in config.sigmas]
    cases.append(("delta", 0.0, "all weights"))
    with progress(make_console(), "training", len(cases) * config.seeds) as advance:
        for kind, sigma, what in cases:
            accuracies = []
            for seed in range(config.seeds):
                settings = config.training(
                    depth=config.depth,
                    width=width,
                    family="wrn",
                    parameterization=kind,
                    seed=seed,
                )

                def prepare(net, sigma=sigma, what=what):
                    for layer in net.modules():
                        if isinstance(layer, nn.Conv2d):
                            nn.init.normal_(layer.weight, std=sigma)
                        elif isinstance(layer, nn.Linear) and what == "all weights":
                            nn.init.zeros_(layer.weight)

                accuracies.append(run_trial(settings, dataset, prepare=prepare).test_accuracy)
                advance(note=f"{kind}, σ {sigma:g}")
            mean, spread = mean_and_spread(accuracies)
            rows.append({"kind": kind, "sigma": sigma, "drawn": what, "accuracies": accuracies, "mean": mean})
            rows[-1] |= {"spread": spread}
            weight = "δ + W" if kind == "delta" else "W"
            print(f"{weight:6s} σ = {sigma:<8g} {what:13s} {100 * mean:5.1f} ± {100 * spread:.1f} %")
    return rows


def _draw(axes, rows) -> None:
    """A line for each kind, side by side, so that none hides another."""
    from train.experiments.trial import COLOURS

    smallest = min((row["sigma"] for row in rows if row["sigma"]), default=1.0)
    kinds = (("delta", "δ + W (eq. 14)", "residual with δ", 1), ("plain", "W", "residual", -1))
    for kind, label, net, side in kinds:
        of_kind = [row for row in rows if row["kind"] == kind and row["drawn"] == "convolutions"]
        places = [row["sigma"] * 1.5**side if row["sigma"] else 0.1 * side * smallest for row in of_kind]
        means, spreads = ([100 * row[key] for row in of_kind] for key in ("mean", "spread"))
        axes.errorbar(places, means, spreads, marker="o", capsize=3, color=COLOURS[net], label=label)
    axes.plot([0], [100 * rows[-1]["mean"]], "kx", markersize=9, zorder=3, label="all weights zero")
    axes.set_xscale("symlog", linthresh=smallest, linscale=1)


if __name__ == "__main__":
    sys.exit(run_command(command, InitializationConfig, examples=EXAMPLES))
