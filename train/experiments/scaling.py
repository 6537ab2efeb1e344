"""python train/experiments/scaling.py: how a of every layer moves during training (section 3.3, Fig. 4)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments import lab

# name: (a at the start, weight decay on a and b)
STARTS = {"5, decay": (5.0, "yes"), "5, no decay": (5.0, "no"), "1, decay": (1.0, "yes"), "1, no decay": (1.0, "no")}
COLOURS = ("Blues", "Greens", "Reds")
EXAMPLES = (
    "python train/experiments/scaling.py --depth 16 --epochs 5",
    "python train/experiments/scaling.py --paper --data-dir data --device cuda",
)


@dataclass(frozen=True)
class ScalingConfig(lab.DeepConfig):
    seeds: Annotated[int, "how often each net is trained; the figure shows the first"] = 1


def command(config: ScalingConfig) -> int:
    """Follow a over training from 5 and from 1, with and without weight decay on it."""
    from train.layers import DiracConv2d

    def scales(net) -> list[float]:
        return [layer.a.item() for layer in net.modules() if isinstance(layer, DiracConv2d)]

    def rows_of(trials: list[lab.Trial]) -> list[lab.JsonRow]:
        for last in (trial.observed[-1] for trial in trials):
            print(f"a ends at {min(last):.2f} to {max(last):.2f}, mean {fmean(last):.2f}")
        return [trial.row(a=trial.observed) for trial in trials]

    cases = [
        lab.Case(f"a from {name}", {"start": name}, {"a0": a, "decay_ab": decay}) for name, (a, decay) in STARTS.items()
    ]
    return lab.conduct(config, "scaling", cases, _draw, rows_of, observe=scales)


def _draw(config: ScalingConfig, rows: list[lab.JsonRow]):
    import numpy as np
    from matplotlib import colormaps

    figure, all_axes = lab.new_figure(len(STARTS), sharey=True)
    for axes, name in zip(all_axes, STARTS, strict=True):
        curves = np.array(next(row["a"] for row in rows if row["start"] == name))  # [epochs + 1, layers]
        per_group = curves.shape[1] // 3
        for layer in range(curves.shape[1]):
            group, place = divmod(layer, per_group)
            shade = colormaps[COLOURS[group]](0.3 + 0.5 * (place + 1) / per_group)  # deeper is later, as in Fig. 4
            first = f"group {group + 1}, deeper: later" if place == per_group - 1 else None
            axes.plot(curves[:, layer], color=shade, label=first)
        axes.set(xlabel="epoch", title=f"a from {name}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    all_axes[0].set_ylabel("a")
    all_axes[0].legend()
    figure.suptitle(f"DiracNet-{config.training().depth}, {config.title()}")
    return figure


if __name__ == "__main__":
    sys.exit(run_command(command, ScalingConfig, examples=EXAMPLES))
