"""python train/experiments/depth.py: accuracy over depth and width, of four kinds of net (3.1, 3.2, Fig. 2)."""

import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments.trial import ExperimentConfig

KINDS = {
    "Dirac": {"parameterization": "dirac"},
    "initialised": {"parameterization": "initialised"},
    "plain": {"parameterization": "plain"},
    "residual": {"family": "wrn"},
}
CHEAP_DEPTHS = (10, 16, 34, 52, 100)
PAPER_DEPTHS = (10, 16, 22, 28, 34, 40, 52, 100, 200, 400)
STYLES = ("-", "--", ":", "-.")  # of the widths
EXAMPLES = (
    "python train/experiments/depth.py --depths 10 34 100 --seeds 1",
    "python train/experiments/depth.py --out docs/experiments --resume       # what is missing there",
    "python train/experiments/depth.py --paper --widths 1 2 4 --data-dir data --device cuda",
)


@dataclass(frozen=True)
class DepthConfig(ExperimentConfig):
    depths: Annotated[tuple[int, ...], "6N + 4 each (cheap: 10 16 34 52 100; paper: 10 to 400)"] = ()
    widths: Annotated[tuple[float, ...], "several width factors, each a line (default: --width alone)"] = ()
    resume: Annotated[bool, "train only what the numbers in --out lack; they are written after each case"] = False


def command(config: DepthConfig) -> int:
    """Train nets at several depths: Dirac, plain with the Dirac net's start, plain with He's, and Wide ResNets.

    All but the last have NCReLU and no skip connections.
    """
    from train.experiments.trial import describe, draw_chance, new_figure, recorded_rows, write_results

    rows = recorded_rows(config, "depth") if config.redraw else _measure(config)
    depths = sorted({row["depth"] for row in rows})
    figure, all_axes = new_figure(2, height=4.4)
    for axes in all_axes:
        _draw(axes, rows)
        draw_chance(axes, config)
        axes.set(xlabel="layers", xscale="log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
    all_axes[0].set(ylabel="test accuracy, % (area: parameters)", ylim=(0, 103))
    all_axes[1].set(title="the same, above 90 %", ylim=(90, 100))
    all_axes[0].set(title=describe(config))
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS) + 1)
    write_results(config.out, "depth", figure, {"settings": config.training(), "rows": rows}, redraw=config.redraw)
    return 0


def _measure(config: DepthConfig) -> list[dict[str, Any]]:
    from itertools import product

    from common.progress import make_console, progress
    from train.experiments.trial import kept_rows, load_dataset, mean_and_spread, run_trial, write_numbers
    from train.families import count_parameters

    dataset = load_dataset(config)
    rows = kept_rows(config, "depth", config.training()) if config.resume else []
    depths = config.depths or (PAPER_DEPTHS if config.paper else CHEAP_DEPTHS)
    done = {(row["depth"], row["kind"], row["width"]) for row in rows}
    cases = [case for case in product(depths, KINDS, config.widths or (config.training().width,)) if case not in done]
    with progress(make_console(), "training", len(cases) * config.seeds) as advance:
        for depth, kind, width in cases:
            trials = []
            for seed in range(config.seeds):
                settings = config.training(depth=depth, width=width, seed=seed, **KINDS[kind])
                trials.append(run_trial(settings, dataset))
                advance(note=f"{kind}-{depth}-{width:g}: {100 * trials[-1].test_accuracy:.1f} %")
            accuracies, parameters = [trial.test_accuracy for trial in trials], count_parameters(trials[0].net)
            mean, spread = mean_and_spread(accuracies)
            rows.append({"kind": kind, "depth": depth, "width": width, "parameters": parameters})
            rows[-1] |= {"accuracies": accuracies, "mean": mean, "spread": spread}
            rows.sort(key=lambda row: (row["depth"], list(KINDS).index(row["kind"]), row["width"]))
            write_numbers(config.out, "depth", {"settings": config.training(), "rows": rows})
            print(f"{kind}-{depth}-{width:g}, {parameters:,} parameters: {100 * mean:.1f} ± {100 * spread:.1f} %")
    return rows


def _draw(axes, rows) -> None:
    """A line for each kind and width, with a circle for each depth whose area says how many parameters there are.

    Kinds stand side by side, so that none hides another.
    """
    from train.experiments.trial import COLOURS

    widths = list(dict.fromkeys(row["width"] for row in rows))
    most = max(row["parameters"] for row in rows)
    for index, kind in enumerate(KINDS):
        for width, style in zip(widths, cycle(STYLES)):
            line = [row for row in rows if (row["kind"], row["width"]) == (kind, width)]
            places = [row["depth"] * 1.06 ** (index - 1.5) for row in line]
            means, spreads = ([100 * row[key] for row in line] for key in ("mean", "spread"))
            label = kind if len(widths) == 1 else f"{kind}, width {width:g}"
            axes.errorbar(places, means, spreads, color=COLOURS[kind], linestyle=style, capsize=3, label=label)
            areas = [20 + 150 * row["parameters"] / most for row in line]
            axes.scatter(places, means, areas, COLOURS[kind], alpha=0.4)


if __name__ == "__main__":
    sys.exit(run_command(command, DepthConfig, examples=EXAMPLES))
