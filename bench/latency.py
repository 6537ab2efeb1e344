"""The distribution of a server's latencies, drawn so that its tail is seen."""

from collections.abc import Mapping, Sequence
from math import log10

from matplotlib.figure import Figure

SHOWN = (50, 75, 90, 95, 99, 99.9)  # percentiles


def draw_latencies(curves: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Figure:
    """A line for each server: its latency in milliseconds at each percentile, as (percentile, ms).

    The axis of percentiles is logarithmic in what is left above them, so that 90, 99 and 99.9 are equally far apart.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        percentiles, latencies_ms = zip(*sorted(points), strict=True)
        axes.plot(
            [_place(percentile) for percentile in percentiles], latencies_ms, marker="o", markersize=3, label=name
        )
    axes.set_xticks(list(map(_place, SHOWN)), [f"{percentile:g} %" for percentile in SHOWN])
    axes.set(xlabel="requests answered within", ylabel="latency, ms", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _place(percentile: float) -> float:
    """1 for 90 %, 2 for 99 %, 3 for 99.9 %."""
    return 2 - log10(100 - percentile)
