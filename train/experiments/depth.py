"""python train/experiments/depth.py: accuracy over depth and width, of four kinds of net (3.1, 3.2, Fig. 2)."""

import sys
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments import lab

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
class DepthConfig(lab.ExperimentConfig):
    depths: Annotated[tuple[int, ...], "6N + 4 each (cheap: 10 16 34 52 100; paper: 10 to 400)"] = ()
    widths: Annotated[tuple[float, ...], "several width factors, each a line (default: --width alone)"] = ()
    resume: Annotated[bool, "train only what the numbers in --out lack; they are written after each case"] = False


def command(config: DepthConfig) -> int:
    """Train nets at several depths: Dirac, plain with the Dirac net's start, plain with He's, and Wide ResNets.

    All but the last have NCReLU and no skip connections.
    """
    rows = lab.recorded_rows(config, "depth") if config.redraw else _measure(config)
    depths = sorted({row["depth"] for row in rows})
    figure, all_axes = lab.new_figure(2, height=4.4)
    for axes in all_axes:
        _draw(axes, rows)
        lab.draw_chance(axes, config)
        axes.set(xlabel="layers", xscale="log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
    all_axes[0].set(ylabel="test accuracy, % (area: parameters)", ylim=(0, 103))
    all_axes[1].set(title="the same, above 90 %", ylim=(90, 100))
    all_axes[0].set(title=config.title())
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS) + 1)
    lab.write_results(config.out, "depth", figure, {"settings": config.training(), "rows": rows}, redraw=config.redraw)
    return 0


def _measure(config: DepthConfig) -> list[dict[str, Any]]:
    from train.families import count_parameters

    depths = config.depths or (PAPER_DEPTHS if config.paper else CHEAP_DEPTHS)
    cases = [
        lab.Case(
            f"{kind}-{depth}-{width:g}",
            {"kind": kind, "depth": depth, "width": width},
            {"depth": depth, "width": width, **KINDS[kind]},
        )
        for depth, kind, width in product(depths, KINDS, config.widths or (config.training().width,))
    ]
    return lab.measure_accuracies(
        config,
        "depth",
        cases,
        resume=config.resume,
        order=lambda row: (row["depth"], list(KINDS).index(row["kind"]), row["width"]),
        figures=lambda trials: {"parameters": count_parameters(trials[0].net)},
    )


def _draw(axes, rows) -> None:
    """A line for each kind and width, with a circle for each depth whose area says how many parameters there are.

    Kinds stand side by side, so that none hides another.
    """
    widths = list(dict.fromkeys(row["width"] for row in rows))
    most = max(row["parameters"] for row in rows)
    for index, kind in enumerate(KINDS):
        for width, style in zip(widths, cycle(STYLES)):
            line = [row for row in rows if (row["kind"], row["width"]) == (kind, width)]
            places = [row["depth"] * 1.06 ** (index - 1.5) for row in line]
            label = kind if len(widths) == 1 else f"{kind}, width {width:g}"
            lab.draw_accuracies(axes, places, line, color=lab.COLOURS[kind], linestyle=style, label=label)
            areas = [20 + 150 * row["parameters"] / most for row in line]
            axes.scatter(places, [100 * row["mean"] for row in line], areas, lab.COLOURS[kind], alpha=0.4)


if __name__ == "__main__":
    sys.exit(run_command(command, DepthConfig, examples=EXAMPLES))
