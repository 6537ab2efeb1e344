"""python train/experiments/sparsity.py: weights under NCReLU and under ReLU (section 3.4, Fig. 3b and Fig. 5)."""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.cli import run_command
from train.experiments import lab

DEAD = 1e-3  # a row is dead where its norm is below this share of its layer's largest
BINS = (-4, 4, 81)  # of the histogram: ends and number of edges
SparsityConfig = lab.DeepConfig
EXAMPLES = (
    "python train/experiments/sparsity.py --depth 16 --epochs 5",
    "python train/experiments/sparsity.py --paper --data-dir data --device cuda",
)


def command(config: SparsityConfig) -> int:
    """Histograms and central slices of W_norm with both nonlinearities, and the share of dead rows.

    δ is left out: with it no row could vanish, and its one value would hide all others.
    """
    import numpy as np

    from train.layers import DiracConv2d, normalize_filters

    def figures(trial: lab.Trial) -> dict[str, Any]:
        layers = [layer for layer in trial.net.modules() if isinstance(layer, DiracConv2d)]
        learned = [normalize_filters(layer.weight).detach().cpu().numpy() for layer in layers]
        if trial.seed:
            return measure(learned)
        counts = np.histogram(np.concatenate([w.ravel() / w.std() for w in learned]), np.linspace(*BINS))[0].tolist()
        middle = np.round(learned[len(learned) // 2][:, :, 1, 1], 5).astype(float).tolist()
        return {**measure(learned), "counts": counts, "slice": middle}

    def rows_of(trials: list[lab.Trial]) -> list[lab.JsonRow]:
        rows = [trial.row(**figures(trial)) for trial in trials]
        for name in ("kurtosis", "dead_rows"):
            print("{}: {:.4f} ± {:.4f}".format(name, *lab.mean_and_spread([row[name] for row in rows])))
        return rows

    cases = [lab.Case(kind, {"nonlinearity": kind}, {"nonlinearity": kind}) for kind in ("ncrelu", "relu")]
    return lab.conduct(config, "sparsity", cases, _draw, rows_of)


def _draw(config: SparsityConfig, rows: list[lab.JsonRow]):
    """How many weights have which value, and a slice of the middle layer in one scale of colours."""
    import numpy as np

    figure, (histogram, *pictures) = lab.new_figure(3)
    first_seed = [row for row in rows if not row["seed"]]
    limit = max(np.abs(row["slice"]).max() for row in first_seed)
    for axes, row, style in zip(pictures, first_seed, ("-", "--"), strict=True):
        name = row["nonlinearity"]
        label, look = f"{name}, {sum(row['counts']):,} weights", {"color": lab.COLOURS[name], "linestyle": style}
        histogram.stairs(row["counts"], np.linspace(*BINS), linewidth=1.5, label=label, **look)
        axes.imshow(row["slice"], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axes.set(title=f"{name}: W_norm, middle layer", xlabel="input channel", ylabel="output channel")
    figure.colorbar(pictures[-1].images[0], ax=pictures, label="W_norm, central slice")
    histogram.set(xlabel="W_norm / its layer's deviation, within ±4", ylabel="weights", yscale="log")
    histogram.legend(loc="lower center")
    figure.suptitle(f"DiracNet-{config.training().depth}, {config.title()}; weights of the first seed")
    return figure


def measure(weights) -> dict[str, float]:
    """Kurtosis of the weights, each layer of unit deviation (3 for a normal distribution), and the share of dead rows.

    A row holds all weights between one input and one output channel's filter bank: weights[:, input] for
    inputs that nothing reads, weights[output] for filters that read nothing.
    """
    import numpy as np

    scaled = np.concatenate([w.ravel() / w.std() for w in weights])
    norms = [np.sqrt((w.astype(np.float64) ** 2).sum(axis=axes)) for w in weights for axes in ((0, 2, 3), (1, 2, 3))]
    dead = np.concatenate([rows < DEAD * rows.max() for rows in norms])
    return {"kurtosis": float((scaled**4).mean() / (scaled**2).mean() ** 2), "dead_rows": float(dead.mean())}


if __name__ == "__main__":
    sys.exit(run_command(command, SparsityConfig, examples=EXAMPLES))
