"""python train/experiments/convergence.py: plain, Dirac and residual nets of equal size (section 3.2, Fig. 3a)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from train.cli import run_command
from train.experiments.trial import ExperimentConfig

NETS = {
    "plain": {"parameterization": "plain"},
    "Dirac": {"parameterization": "dirac"},
    "residual": {"family": "wrn"},
}
EXAMPLES = (
    "python train/experiments/convergence.py --depth 34 --epochs 20",
    "python train/experiments/convergence.py --paper --data-dir data --device cuda",
)


@dataclass(frozen=True)
class ConvergenceConfig(ExperimentConfig):
    depth: Annotated[int, "6N + 4 layers"] = 34
    seeds: Annotated[int, "how often each net is trained; the figure shows the mean"] = 3


def command(config: ConvergenceConfig) -> int:
    """Training and validation error over epochs for the three kinds of net."""
    import numpy as np

    from train.experiments.trial import describe, load_dataset, mean_and_spread, new_figure, run_trial, write_results
    from train.families import count_parameters
    from train.progress import make_console, progress

    dataset, rows = load_dataset(config), []
    width = config.training().width
    residual_width = _width_of_equal_size(config, dataset.info)
    with progress(make_console(), "training", len(NETS) * config.seeds) as advance:
        for name, fields in NETS.items():
            for seed in range(config.seeds):
                net_width = residual_width if name == "residual" else width
                settings = config.training(depth=config.depth, **fields, seed=seed, width=net_width)
                trial = run_trial(settings, dataset)
                rows.append({"net": name, "seed": seed, "parameters": count_parameters(trial.net)})
                rows[-1] |= {"history": trial.history, "test_accuracy": trial.test_accuracy}
                advance(note=name)
            mean, spread = mean_and_spread([row["test_accuracy"] for row in rows if row["net"] == name])
            print(f"{name:9s} {rows[-1]['parameters']:9,} parameters: {100 * mean:.1f} ± {100 * spread:.1f} %")

    figure, (axes,) = new_figure(1)
    for index, name in enumerate(NETS):
        of_net = [row for row in rows if row["net"] == name]
        histories, parameters = [row["history"] for row in of_net], of_net[0]["parameters"]
        for key, style in (("train_accuracy", "--"), ("validation_accuracy", "-")):
            error = 100 * (1 - np.mean([[epoch[key] for epoch in history] for history in histories], axis=0))
            label = f"{name}, {parameters:,} parameters" if style == "-" else None
            axes.plot(np.arange(1, len(error) + 1), error, f".{style}", color=f"C{index}", label=label)
    axes.set(
        xlabel="epoch",
        ylabel="error, % (solid: validation, dashed: training)",
        title=f"{config.depth} layers, {describe(config)}",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    write_results(config.out, "convergence", figure, {"settings": config.training(depth=config.depth), "rows": rows})
    return 0


def _width_of_equal_size(config: ConvergenceConfig, info) -> float:
    """The width at which the residual net's number of parameters is nearest to the Dirac net's.

    It is about sqrt(2) times as wide: without NCReLU its convolutions have half the weights.
    """
    from train.families import count_parameters, outline
    from train.steps import make_spec

    def size(name: str, width: float) -> int:
        settings = config.training(depth=config.depth, width=width, **NETS[name])
        return count_parameters(outline(make_spec(settings, info.image, info.labels)))

    width = config.training().width
    wanted = size("Dirac", width)
    widths = [channels / 16 for channels in range(1, int(32 * width) + 1)]
    return min(widths, key=lambda residual: abs(size("residual", residual) - wanted))


if __name__ == "__main__":
    sys.exit(run_command(command, ConvergenceConfig, examples=EXAMPLES))
