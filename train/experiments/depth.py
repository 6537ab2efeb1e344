"""python train/experiments/depth.py: Dirac nets train at depths where plain nets fail (section 3.1, Fig. 2)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from train.cli import run_command
from train.experiments.trial import ExperimentConfig

KINDS = {"Dirac": "dirac", "plain": "plain"}
EXAMPLES = (
    "python train/experiments/depth.py --depths 10 34 100 --seeds 1",
    "python train/experiments/depth.py --paper --data-dir data --device cuda",
)


@dataclass(frozen=True)
class DepthConfig(ExperimentConfig):
    depths: Annotated[tuple[int, ...], "6N + 4 each"] = (10, 16, 34, 52, 100)


def command(config: DepthConfig) -> int:
    """Train plain nets with and without Dirac parameterization at several depths, NCReLU in both."""
    from dataclasses import asdict

    from train.experiments.trial import (
        describe,
        load_dataset,
        mean_and_spread,
        new_figure,
        run_trial,
        write_results,
    )
    from train.progress import make_console, progress

    dataset, rows = load_dataset(config), []
    total = len(config.depths) * len(KINDS) * config.seeds
    with progress(make_console(), "training", total) as advance:
        for depth in config.depths:
            for kind, parameterization in KINDS.items():
                accuracies = []
                for seed in range(config.seeds):
                    settings = config.training(depth=depth, parameterization=parameterization, seed=seed)
                    accuracies.append(run_trial(settings, dataset).test_accuracy)
                    advance(note=f"{kind} {depth}: {100 * accuracies[-1]:.1f} %")
                mean, spread = mean_and_spread(accuracies)
                rows.append({"kind": kind, "depth": depth, "accuracies": accuracies, "mean": mean, "spread": spread})
                print(f"{kind:6s} {depth:4d} layers: {100 * mean:5.1f} ± {100 * spread:.1f} %")

    figure, (axes,) = new_figure(1)
    for kind in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        depths = [row["depth"] for row in of_kind]
        means, spreads = ([100 * row[key] for row in of_kind] for key in ("mean", "spread"))
        axes.errorbar(depths, means, spreads, marker="o", capsize=3, label=kind)
    axes.set(xlabel="layers", ylabel="test accuracy, %", xscale="log", title=describe(config))
    axes.set_xticks(config.depths, [str(depth) for depth in config.depths])
    axes.minorticks_off()
    axes.legend()
    write_results(config.out, "depth", figure, {"settings": asdict(config.training()), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, DepthConfig, examples=EXAMPLES))
