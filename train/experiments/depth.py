"""python train/experiments/depth.py: accuracy over depth and width, of four kinds of net (3.1, 3.2, Fig. 2)."""

import sys
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments import lab

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
    from train.families import count_parameters

    depths = config.depths or (PAPER_DEPTHS if config.paper else CHEAP_DEPTHS)
    cases = lab.grid([*lab.KINDS], depths, "width", config.widths or (config.training().width,))

    def rows_of(trials: list[lab.Trial]) -> list[lab.JsonRow]:
        return lab.accuracies(trials, parameters=count_parameters(trials[0].net))

    order = ("depth", "kind", "width")
    return lab.conduct(config, "depth", cases, _draw, rows_of, resume=config.resume, order=order)


def _draw(config: DepthConfig, rows: list[lab.JsonRow]):
    """A line for each kind and width, with a circle for each depth whose area says how many parameters there are.

    Kinds stand side by side, so that none hides another.
    """
    figure, all_axes = lab.new_figure(2, height=4.4)
    depths, widths = (sorted({row[key] for row in rows}) for key in ("depth", "width"))
    most = max(row["parameters"] for row in rows)
    for axes, (index, kind), (width, style) in product(all_axes, enumerate(lab.KINDS), zip(widths, cycle(STYLES))):
        line = [row for row in rows if (row["kind"], row["width"]) == (kind, width)]
        places = [row["depth"] * 1.06 ** (index - 1.5) for row in line]
        label = kind if len(widths) == 1 else f"{kind}, width {width:g}"
        lab.draw_accuracies(axes, places, line, color=lab.COLOURS[kind], linestyle=style, label=label)
        areas = [20 + 150 * row["parameters"] / most for row in line]
        axes.scatter(places, [100 * row["mean"] for row in line], areas, lab.COLOURS[kind], alpha=0.4)
    for axes in all_axes:
        lab.draw_chance(axes, config)
        axes.set(xlabel="layers", xscale="log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
    all_axes[0].set(title=config.title(), ylabel="test accuracy, % (area: parameters)", ylim=(0, 103))
    all_axes[1].set(title="the same, above 90 %", ylim=(90, 100))
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lab.KINDS) + 1)
    return figure


if __name__ == "__main__":
    sys.exit(run_command(command, DepthConfig, examples=EXAMPLES))
