"""python train/experiments/parameterization.py: what eq. 4 brings beyond its start, over learning rates."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments.trial import ExperimentConfig

KINDS = {"Dirac": "dirac", "initialised": "initialised", "plain": "plain"}
EXAMPLES = (
    "python train/experiments/parameterization.py --depths 34 --lrs 0.05 0.1 --seeds 1",
    "python train/experiments/parameterization.py --dataset fashion-mnist --depths 16 --width 1 --epochs 4",
    "python train/experiments/parameterization.py --paper --data-dir data --device cuda",
)


@dataclass(frozen=True)
class ParameterizationConfig(ExperimentConfig):
    depths: Annotated[tuple[int, ...], "6N + 4 each"] = (34,)
    resume: Annotated[bool, "train only what the numbers in --out lack; they are written after each case"] = False
    lrs: Annotated[tuple[float, ...], "learning rates at the start"] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def command(config: ParameterizationConfig) -> int:
    """Train Dirac nets, ordinary ones that start as the same function, and ordinary ones that start as He's normal.

    All are of one shape, with NCReLU and without skip connections; each is given every learning rate.
    """
    from train.experiments.trial import describe, draw_chance, new_figure, recorded_rows, write_results

    rows = recorded_rows(config, "parameterization") if config.redraw else _measure(config)
    depths = sorted({row["depth"] for row in rows})
    figure, all_axes = new_figure(len(depths), height=4.4, sharey=True)
    for axes, depth in zip(all_axes, depths, strict=True):
        _draw(axes, [row for row in rows if row["depth"] == depth])
        draw_chance(axes, config)
        axes.set(title=f"{depth} layers, {describe(config)}", xlabel="learning rate", xscale="log")
        lrs = sorted({row["lr"] for row in rows})
        axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        axes.minorticks_off()
    all_axes[0].set(ylabel="test accuracy, %", ylim=(0, 103))
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS) + 1)
    numbers = {"settings": config.training(), "rows": rows}
    write_results(config.out, "parameterization", figure, numbers, redraw=config.redraw)
    return 0


def _measure(config: ParameterizationConfig) -> list[dict[str, Any]]:
    from itertools import product

    from common.progress import make_console, progress
    from train.experiments.trial import kept_rows, load_dataset, mean_and_spread, run_trial, write_numbers

    dataset = load_dataset(config)
    rows = kept_rows(config, "parameterization", config.training()) if config.resume else []
    done = {(row["depth"], row["kind"], row["lr"]) for row in rows}
    cases = [case for case in product(config.depths, KINDS, config.lrs) if case not in done]
    with progress(make_console(), "training", len(cases) * config.seeds) as advance:
        for depth, kind, lr in cases:
            trials = []
            for seed in range(config.seeds):
                settings = config.training(depth=depth, lr=lr, seed=seed, parameterization=KINDS[kind])
                trials.append(run_trial(settings, dataset))
                advance(note=f"{kind}-{depth}, rate {lr:g}: {100 * trials[-1].test_accuracy:.1f} %")
            accuracies = [trial.test_accuracy for trial in trials]
            held_out = [trial.history[-1]["validation_accuracy"] for trial in trials]
            mean, spread = mean_and_spread(accuracies)
            row = {"kind": kind, "depth": depth, "lr": lr, "accuracies": accuracies, "mean": mean, "spread": spread}
            rows.append(row | {"validation_accuracy": mean_and_spread(held_out)[0]})
            rows.sort(key=lambda row: (row["depth"], list(KINDS).index(row["kind"]), row["lr"]))
            write_numbers(config.out, "parameterization", {"settings": config.training(), "rows": rows})
            print(f"{kind}-{depth}, rate {lr:g}: {100 * mean:.1f} ± {100 * spread:.1f} %")
    return rows


def _draw(axes, rows) -> None:
    """A line for each kind, side by side, so that none hides another."""
    from train.experiments.trial import COLOURS

    for index, kind in enumerate(KINDS):
        line = [row for row in rows if row["kind"] == kind]
        places = [row["lr"] * 1.04 ** (index - 1) for row in line]
        means, spreads = ([100 * row[key] for row in line] for key in ("mean", "spread"))
        axes.errorbar(places, means, spreads, marker="o", capsize=3, color=COLOURS[kind], label=kind)


if __name__ == "__main__":
    sys.exit(run_command(command, ParameterizationConfig, examples=EXAMPLES))
