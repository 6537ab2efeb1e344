"""python train/experiments/initialization.py: residual nets with δ + W from any W (section 3.6, eq. 14)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from train.cli import run_command
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
    from torch import nn

    from train.experiments.trial import describe, load_dataset, mean_and_spread, new_figure, run_trial, write_results
    from train.progress import make_console, progress

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

    figure, (axes,) = new_figure(1)
    for kind, label in (("delta", "δ + W (eq. 14)"), ("plain", "W")):
        of_kind = [row for row in rows if row["kind"] == kind and row["drawn"] == "convolutions"]
        means, spreads = ([100 * row[key] for row in of_kind] for key in ("mean", "spread"))
        axes.errorbar([row["sigma"] for row in of_kind], means, spreads, marker="o", capsize=3, label=label)
    axes.plot([0], [100 * rows[-1]["mean"]], "kx", markersize=9, zorder=3, label="all weights zero")
    smallest = min((sigma for sigma in config.sigmas if sigma), default=1.0)
    axes.set_xscale("symlog", linthresh=smallest, linscale=1)
    axes.set(xlabel="σ", ylabel="test accuracy, %", title=f"ResNet-{config.depth}, {describe(config)}")
    axes.legend()
    write_results(config.out, "initialization", figure, {"settings": config.training(depth=config.depth), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, InitializationConfig, examples=EXAMPLES))
