"""python train/experiments/delta.py: the slices of δ for 16 input and 32 output channels (eq. 8, Fig. 1)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments import lab

EXAMPLES = ("python train/experiments/delta.py --out docs/experiments",)


@dataclass(frozen=True)
class DeltaConfig:
    inputs: Annotated[int, "N_i"] = 16
    outputs: Annotated[int, "N_o, a multiple of N_i or a divisor"] = 32
    out: Annotated[Path, "folder for the figure and the numbers"] = Path("runs/experiments")


def command(config: DeltaConfig) -> int:
    """Draw the nine slices of δ for a 3x3 filter."""
    from train.layers import dirac_delta

    delta = dirac_delta((config.outputs, config.inputs, 3, 3)).numpy()
    figure, all_axes = lab.new_figure(9, height=3.2)
    figure.set_size_inches(11, 3.2)
    for index, axes in enumerate(all_axes):
        row, column = divmod(index, 3)
        axes.imshow(delta[:, :, row, column], cmap="gray_r", vmin=0, vmax=1)
        axes.set(title=f"{row}, {column}", xticks=[], yticks=[])
    all_axes[0].set(xlabel=f"{config.inputs} inputs", ylabel=f"{config.outputs} outputs")
    ones = [[int(place) for place in where] for where in zip(*delta.nonzero(), strict=True)]
    lab.write_results(config.out, "delta", figure, {"shape": list(delta.shape), "ones": ones})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, DeltaConfig, examples=EXAMPLES))
