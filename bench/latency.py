"""The distribution of a server's latencies, drawn so that its tail is seen."""

import statistics
from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

from matplotlib.figure import Figure

PERCENTILES = {"p50_ms": 50, "p75_ms": 75, "p90_ms": 90, "p95_ms": 95, "p99_ms": 99, "p99_9_ms": 99.9}


def curves_of(rows: Sequence[dict[str, Any]], num_connections: int) -> dict[str, list[tuple[float, float]]]:
    """Of each row of bench/server.py that did not fail, (percentile, ms): the median of its rounds."""
    return {
        row["title"]: [
            (percentile, statistics.median(load[name] for load in row["loads"][str(num_connections)]))
            for name, percentile in PERCENTILES.items()
        ]
        for row in rows
        if not row["failed"]
    }


def draw_latencies(curves: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Figure:
    """A line for each server: its latency in milliseconds at each percentile, as (percentile, ms).

    The axis of percentiles is logarithmic in what is left above them, so that 90, 99 and 99.9 are equally far apart.
    """
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        percentiles, latencies_ms = zip(*sorted(points), strict=True)
        axes.plot(
            [_place(percentile) for percentile in percentiles], latencies_ms, marker="o", markersize=3, label=name
        )
    axes.set_xticks(
        list(map(_place, PERCENTILES.values())), [f"{percentile:g} %" for percentile in PERCENTILES.values()]
    )
    axes.set(xlabel="requests answered within", ylabel="latency, ms", yscale="log", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _place(percentile: float) -> float:
    """1 for 90 %, 2 for 99 %, 3 for 99.9 %."""
    return 2 - log10(100 - percentile)
