"""The page of bench/server.py: what was recorded, whether each bar is met, and the latencies as a picture."""

from collections.abc import Sequence
from math import log10
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from bench.lab.page import Record, render

OURS = "ours, raw body"
NAIVE = "FastAPI handler, raw body"
PERCENTILES = {"p50_ms": 50, "p75_ms": 75, "p90_ms": 90, "p95_ms": 95, "p99_ms": 99, "p99_9_ms": 99.9}
# By what factor ours is to answer more than these at the most connections: with the small model, with the large one.
_RATIOS = {"LitServe": (10.0, 3.5), "FastAPI handler, form": (5.0, 3.5), NAIVE: (5.0, 3.5), "MLServer": (5.0, 3.5)}
_LARGE_MACS = 10e6
_SHARE = 0.85  # of the model alone, where the model is large
_LONE_MS = 1.5  # that a lone request may cost beside decoding and model
_REST = "the rest: sockets, and two threads and their caches on one core"


class Bar(NamedTuple):
    """One promise, what was found, and whether it is kept."""

    promise: str
    found: str
    is_met: bool


def markdown(record: Record) -> str:
    """The page of one record."""
    models, connections = record["models"], record["connections"]
    bars = [bar for model in models for bar in bars_of(model, connections)]
    return render(
        "server",
        record,
        short="\n".join(_in_short(model, connections) for model in models),
        models=[_section(model, connections) for model in models],
        bars=[bar._asdict() | {"verdict": "met" if bar.is_met else "**not met**"} for bar in bars],
    )


def bars_of(model: Record, connections: Sequence[int]) -> list[Bar]:
    """The bars of one model; without ours there are none, and none is judged against a row that failed."""
    rows = _rows(model)
    if OURS not in rows:
        return []
    bars, most, ours, name = [], connections[-1], rows.pop(OURS), _millions(model)
    is_large = model["macs"] > _LARGE_MACS
    without_server = max(np.median(_alone(model, size)) for size in (1, 32))
    for title in [title for title in _RATIOS if title in rows]:
        ratio, found = _RATIOS[title][is_large], _ratio(ours, rows[title], most)
        bound = without_server / _median(rows[title], most, "requests_per_s")
        shown = f"{found:.1f}x; without any cost of a server {bound:.1f}x"
        bars.append(Bar(f"{name}: {ratio:g}x {title} at {most} connections", shown, found >= ratio))
    others = [(_median(row, most, "p99_ms"), title) for title, row in rows.items() if row["server"] != "ours"]
    if others:
        (best, title), p99 = min(others), _median(ours, most, "p99_ms")
        shown = f"{p99:.1f} ms; the lowest other is {title} with {best:.1f} ms"
        bars.append(Bar(f"{name}: p99 at {most} connections below all others", shown, p99 < best))
    if is_large:
        share = np.median(_loads(ours, most, "requests_per_s") / _alone(model, 32))
        bars.append(Bar(f"{name}: {_SHARE:.0%} of the model alone", f"{share:.1%}", share >= _SHARE))
    lone_ms = _median(ours, 1, "p50_ms") - np.median(model["alone"]["decode_and_model_1"])
    promise = f"{name}: a lone request costs {_LONE_MS} ms beside its work"
    return [*bars, Bar(promise, f"{lone_ms:.2f} ms", lone_ms <= _LONE_MS)]


def _in_short(model: Record, connections: Sequence[int]) -> str:
    """The first words on a model: latency under load, then throughput, like with like, the worst case too."""
    rows, few, most = _rows(model), connections[0], connections[-1]
    if OURS not in rows or len(rows) < 2:
        return f"- {_millions(model)}: nothing to compare."
    ours = rows[OURS]
    others = {title: row for title, row in rows.items() if row["server"] != "ours"}
    p99 = sorted((_median(row, most, "p99_ms"), title) for title, row in others.items())
    text = (
        f"- {_millions(model)}: with {most} connections, 99 % of the requests are answered within "
        f"{_median(ours, most, 'p99_ms'):.1f} ms. Others: {', '.join(f'{title} {ms:.1f}' for ms, title in p99)}."
    )
    if NAIVE in others:
        text += (
            f" Requests/s divided by those of a handler that takes the same raw body: "
            f"{_ratio(ours, others[NAIVE], few):.2f} with {few} connection, "
            f"{_ratio(ours, others[NAIVE], most):.2f} with {most}."
        )
    ratios = {title: _ratio(ours, row, most) for title, row in others.items()}
    if more := ", ".join(f"{title} {1 / ratio:.2f} times" for title, ratio in ratios.items() if ratio < 1):
        text += f" More requests/s than ours with {most} connections: {more}."
    return text


def _section(model: Record, connections: Sequence[int]) -> dict[str, Any]:
    """The figures of the template of one model."""
    ours, most = _rows(model).get(OURS), connections[-1]
    return {
        **model,
        "millions": _millions(model),
        "most": most,
        **{f"alone_{size}": _alone(model, size).tolist() for size in (1, 32)},
        "decode_and_model_1": float(np.median(model["alone"]["decode_and_model_1"])),
        "rows": [_cells(row, ours, connections) for row in model["rows"]],
        "steps": render("server-steps", {"most": most, "steps": _steps(model["steps"], ours, most)}) if ours else "",
    }


def _cells(row: Record, ours: Record | None, connections: Sequence[int]) -> dict[str, Any]:
    """The figures of one server, by name and number of connections; a reason in their place where it failed."""
    cells: dict[str, Any] = {"title": row["title"]}
    for place, num in enumerate(connections):
        for name in ("p99_ms", "p50_ms", "requests_per_s"):
            failed = "" if place else f"failed: {row['failed']}".replace("|", "/")  # a pipe would end the cell
            cells[f"{name}_{num}"] = failed if row["failed"] else _loads(row, num, name).tolist()
        cells[f"ratio_{num}"] = failed if row["failed"] else _ratio(ours, row, num) if ours else ""
    return cells


def _steps(steps: dict[str, float], ours: Record, most: int) -> list[dict[str, Any]]:
    """Where the time of one of our requests goes."""
    whole = 1e6 / _median(ours, most, "requests_per_s")
    all_us = {**steps, _REST: whole - sum(steps.values()), "a request": whole}
    return [{"part": part, "us": us, "share": us / whole} for part, us in all_us.items()]


def draw_latencies(model: Record, most: int) -> Figure:
    """A line for each server that did not fail: its latency in ms at each percentile, the median of its rounds.

    The axis of percentiles is logarithmic in the share left above them: 90, 99 and 99.9 are equally far apart.
    """
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axes = figure.subplots()
    places = [2 - log10(100 - percentile) for percentile in PERCENTILES.values()]  # 1 for 90 %, 2 for 99 %
    for title, row in _rows(model).items():
        latencies_ms = [_median(row, most, name) for name in PERCENTILES]
        axes.plot(places, latencies_ms, marker="o", markersize=3, label=title)
    axes.set_xticks(places, [f"{percentile:g} %" for percentile in PERCENTILES.values()])
    title = f"{model['title']}: {most} connections"
    axes.set(xlabel="requests answered within", ylabel="latency, ms", yscale="log", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _rows(model: Record) -> dict[str, Record]:
    """By title, those that did not fail."""
    return {row["title"]: row for row in model["rows"] if not row["failed"]}


def _loads(row: Record, num: int, name: str) -> np.ndarray:
    """A measurement with `num` connections, in each round."""
    return np.array([load[name] for load in row["loads"][str(num)]])


def _median(row: Record, num: int, name: str) -> float:
    return float(np.median(_loads(row, num, name)))


def _ratio(ours: Record, other: Record, num: int) -> float:
    return float(np.median(_loads(ours, num, "requests_per_s") / _loads(other, num, "requests_per_s")))


def _alone(model: Record, size: int) -> np.ndarray:
    """Images/s of the model alone in batches, in each round."""
    return 1000 * size / np.array(model["alone"][f"model_{size}"])


def _millions(model: Record) -> str:
    return f"{model['macs'] / 1e6:.1f} MMAC"
