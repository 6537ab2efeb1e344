"""The page of bench/server.py: what was recorded, whether each bar is met, and the latencies as a picture."""

from collections.abc import Mapping
from math import log10
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.lab.page import Record, render

OURS = "ours, raw body"
NAIVE = "FastAPI handler, raw body"
CONNECTIONS = (1, 16, 64)
MOST = CONNECTIONS[-1]
PERCENTILES = {"p50_ms": 50, "p75_ms": 75, "p90_ms": 90, "p95_ms": 95, "p99_ms": 99, "p99_9_ms": 99.9}
# By what factor ours is to answer more than these at the most connections: with the small model, with the large one.
_RATIOS = {"LitServe": (10.0, 3.5), "FastAPI handler, form": (5.0, 3.5), NAIVE: (5.0, 3.5), "MLServer": (5.0, 3.5)}
_LARGE_MACS = 10e6
_SHARE = 0.85  # of the model alone, where the model is large
_LONE_MS = 1.5  # that a lone request may cost beside decoding and model
_REST = "the rest: sockets, and two threads and their caches on one core"


def page(record: Record) -> str:
    models = record["models"]
    return render(
        "server",
        record,
        short="\n".join(map(_in_short, models)),
        models=list(map(_section, models)),
        bars=[bar for model in models for bar in judge_bars(model)],
    )


def judge_bars(model: Record) -> list[dict[str, str]]:
    """The bars of one model; without ours there are none, and none is judged against a row that failed."""
    bars: list[dict[str, str]] = []
    rows, is_large = _rows(model), model["macs"] > _LARGE_MACS
    if OURS not in rows:
        return bars

    def judge(promise: str, found: str, is_met: bool) -> None:
        promise = f"{_millions(model)}: {promise}"
        bars.append({"promise": promise, "found": found, "verdict": "met" if is_met else "**not met**"})

    ours, without_server = rows[OURS], max(np.median(_alone(model, size)) for size in (1, 32))
    for title in [title for title in _RATIOS if title in rows]:
        ratio, found = _RATIOS[title][is_large], _ratio(ours, rows[title])
        bound = without_server / _median(rows[title], "requests_per_s")
        shown = f"{found:.1f}x; without any cost of a server {bound:.1f}x"
        judge(f"{ratio:g}x {title} at {MOST} connections", shown, found >= ratio)
    if others := _p99_of_others(rows):
        (best, title), p99 = others[0], _median(ours, "p99_ms")
        shown = f"{p99:.1f} ms; the lowest other is {title} with {best:.1f} ms"
        judge(f"p99 at {MOST} connections below all others", shown, p99 < best)
    if is_large:
        share = np.median(_loads(ours, "requests_per_s") / _alone(model, 32))
        judge(f"{_SHARE:.0%} of the model alone", f"{share:.1%}", share >= _SHARE)
    lone_ms = _median(ours, "p50_ms", 1) - np.median(model["alone"]["decode_and_model_1"])
    judge(f"a lone request costs {_LONE_MS} ms beside its work", f"{lone_ms:.2f} ms", lone_ms <= _LONE_MS)
    return bars


def _in_short(model: Record) -> str:
    """The first words on a model: latency under load, then throughput, like with like, the worst case too."""
    rows = _rows(model)
    others = _p99_of_others(rows)
    if OURS not in rows or not others:
        return f"- {_millions(model)}: nothing to compare."
    ours, ratios = rows[OURS], {title: _ratio(rows[OURS], rows[title]) for _, title in others}
    text = (
        f"- {_millions(model)}: with {MOST} connections, 99 % of the requests are answered within "
        f"{_median(ours, 'p99_ms'):.1f} ms. Others: {', '.join(f'{title} {ms:.1f}' for ms, title in others)}."
    )
    if NAIVE in rows:
        text += (
            f" Requests/s divided by those of a handler that takes the same raw body: "
            f"{_ratio(ours, rows[NAIVE], 1):.2f} with 1 connection, {ratios[NAIVE]:.2f} with {MOST}."
        )
    if more := ", ".join(f"{title} {1 / ratio:.2f} times" for title, ratio in ratios.items() if ratio < 1):
        text += f" More requests/s than ours with {MOST} connections: {more}."
    return text


def _p99_of_others(rows: Mapping[str, Record]) -> list[tuple[float, str]]:
    """In ms, the lowest first, with the title."""
    return sorted((_median(row, "p99_ms"), title) for title, row in rows.items() if row["server"] != "ours")


def _section(model: Record) -> dict[str, Any]:
    ours = _rows(model).get(OURS)
    return {
        **model,
        "millions": _millions(model),
        **{f"alone_{size}": _alone(model, size).tolist() for size in (1, 32)},
        "decode_and_model_1": float(np.median(model["alone"]["decode_and_model_1"])),
        "rows": [_cells(row, ours) for row in model["rows"]],
        "steps": render("server-steps", {"steps": _steps(model["steps"], ours)}) if ours else "",
    }


def _cells(row: Record, ours: Record | None) -> dict[str, Any]:
    """The figures of one server, by name and number of connections; a reason in their place where it failed."""
    cells: dict[str, Any] = {"title": row["title"]}
    reason = f"failed: {row['failed']}".replace("|", "/")  # a pipe would end the cell
    for num in CONNECTIONS:
        for name in ("p99_ms", "p50_ms", "requests_per_s"):
            cells[f"{name}_{num}"] = reason if row["failed"] else _loads(row, name, num).tolist()
        cells[f"ratio_{num}"] = reason if row["failed"] else _ratio(ours, row, num) if ours else ""
        reason = ""
    return cells


def _steps(steps: dict[str, float], ours: Record) -> list[dict[str, Any]]:
    whole = 1e6 / _median(ours, "requests_per_s")
    all_us = {**steps, _REST: whole - sum(steps.values()), "a request": whole}
    return [{"part": part, "us": us, "share": us / whole} for part, us in all_us.items()]


def draw_latencies(model: Record) -> Figure:
    """A line for each server that did not fail: its latency in ms at each percentile, the median of its rounds.

    The axis of percentiles is logarithmic in the share left above them: 90, 99 and 99.9 are equally far apart.
    """
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axes = figure.subplots()
    places = [2 - log10(100 - percentile) for percentile in PERCENTILES.values()]  # 1 for 90 %, 2 for 99 %
    for title, row in _rows(model).items():
        axes.plot(places, [_median(row, name) for name in PERCENTILES], marker="o", markersize=3, label=title)
    axes.set_xticks(places, [f"{percentile:g} %" for percentile in PERCENTILES.values()])
    title = f"{model['title']}: {MOST} connections"
    axes.set(xlabel="requests answered within", ylabel="latency, ms", yscale="log", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _rows(model: Record) -> dict[str, Record]:
    """By title, those that did not fail."""
    return {row["title"]: row for row in model["rows"] if not row["failed"]}


def _loads(row: Record, name: str, num: int = MOST) -> np.ndarray:
    """A measurement with `num` connections, in each round."""
    return np.array([load[name] for load in row["loads"][str(num)]])


def _median(row: Record, name: str, num: int = MOST) -> float:
    return float(np.median(_loads(row, name, num)))


def _ratio(ours: Record, other: Record, num: int = MOST) -> float:
    return float(np.median(_loads(ours, "requests_per_s", num) / _loads(other, "requests_per_s", num)))


def _alone(model: Record, size: int) -> np.ndarray:
    """Images/s of the model alone in batches, in each round."""
    return 1000 * size / np.array(model["alone"][f"model_{size}"])


def _millions(model: Record) -> str:
    return f"{model['macs'] / 1e6:.1f} MMAC"
