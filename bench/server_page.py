"""What bench/server.py recorded, as a page of Markdown that says of every bar whether it is met."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.page import machine_table, table

OURS = "ours, raw body"
NAIVE = "FastAPI handler, raw body"
# Times the throughput of each, at the most connections, for a model of up to so many multiplications.
_RATIOS = (
    (10e6, {"LitServe": 10.0, "FastAPI handler, form": 5.0, "FastAPI handler, raw body": 5.0, "MLServer": 5.0}),
    (1e9, {"LitServe": 3.5, "FastAPI handler, form": 3.5, "FastAPI handler, raw body": 3.5, "MLServer": 3.5}),
)
_LARGE_MACS = 10e6
_SHARE = 0.85  # of the model alone, where the model is large
_LONE_MS = 1.5  # what a lone request may cost beside decoding and model


@dataclass(frozen=True)
class Bar:
    """One promise, what was found, and whether it is kept."""

    promise: str
    found: str
    is_met: bool


def markdown(record: dict[str, Any]) -> str:
    """The page of one record."""
    parts = [
        "# Servers of one model on one core",
        "\n".join(_in_short(model, record["connections"]) for model in record["models"]),
        f"Written by `{record['command']}`. Every server serves the same ONNX file with one worker on core 0; the "
        f"client, wrk, has core 1 and posts the ten PNGs of `models/held-out/` in turn. A connection asks again as "
        f"soon as it is answered. Each figure is the median of {record['rounds']} rounds of {record['seconds']} s, in "
        "brackets the lowest and the highest round. Every round starts every server anew, checks its answers against "
        "the model's own classes, and runs the servers in the other order than the round before. A row fails with "
        "its first status above 399, broken connection or timeout of 10 s. Ratios are medians of ratios within a "
        "round.",
        machine_table(record["machine"]),
        "How each server is set up; access logs of the others are off, and ONNX Runtime has one thread in all:",
        table(["server", "setup"], [[server["name"], server["note"]] for server in record["servers"]]),
        "Versions are in `bench/peers/*.txt` and `constraints.txt`.",
    ]
    for model in record["models"]:
        parts += _model(model, record["connections"])
    bars = [bar for model in record["models"] for bar in bars_of(model, record["connections"])]
    parts += [
        "## Bars",
        "What the model alone answers on that core, without decoding, HTTP or Python, bounds every ratio.",
        table(["", "found", ""], [[bar.promise, bar.found, "met" if bar.is_met else "**not met**"] for bar in bars]),
    ]
    return "\n\n".join(parts) + "\n"


def bars_of(model: dict[str, Any], connections: Sequence[int]) -> list[Bar]:
    """The bars of one model; without ours there are none, and none is judged against a row that failed."""
    rows = {row["title"]: row for row in model["rows"] if not row["failed"]}
    if OURS not in rows:
        return []
    most, ours, name = str(connections[-1]), rows.pop(OURS), _millions(model)
    wanted = next(ratios for macs, ratios in _RATIOS if model["macs"] < macs)
    bars = []
    for title, ratio in wanted.items():
        if title in rows:
            found = _ratio(ours, rows[title], most)
            shown = f"{found:.1f}x; without any cost of a server {_bound(model, rows[title], most):.1f}x"
            bars.append(Bar(f"{name}: {ratio:g}x {title} at {most} connections", shown, found >= ratio))
    others = {title: _median(row, most, "p99_ms") for title, row in rows.items() if row["server"] != "ours"}
    if others:
        best, p99 = min(others, key=lambda title: others[title]), _median(ours, most, "p99_ms")
        found = f"{p99:.1f} ms; the lowest other is {best} with {others[best]:.1f} ms"
        bars.append(Bar(f"{name}: p99 at {most} connections below all others", found, p99 < others[best]))
    if model["macs"] > _LARGE_MACS:
        share = statistics.median(
            load["requests_per_s"] * alone_ms / 32000
            for load, alone_ms in zip(ours["loads"][most], model["alone"]["model_32"], strict=True)
        )
        bars.append(Bar(f"{name}: {_SHARE:.0%} of the model alone", f"{share:.1%}", share >= _SHARE))
    lone_ms = _median(ours, "1", "p50_ms") - statistics.median(model["alone"]["decode_and_model_1"])
    found = f"{lone_ms:.2f} ms"
    bars.append(Bar(f"{name}: a lone request costs {_LONE_MS} ms beside its work", found, lone_ms <= _LONE_MS))
    return bars


def _model(model: dict[str, Any], connections: Sequence[int]) -> list[str]:
    alone = model["alone"]
    return [
        f"## {_millions(model)} per image: {model['title']}",
        f"The model alone on the servers' core: {_alone(alone['model_1'], 1)} images/s one by one, "
        f"{_alone(alone['model_32'], 32)} in batches of 32. Decoding and classifying one image in the process: "
        f"{statistics.median(alone['decode_and_model_1']):.3f} ms.",
        "Latency that 99 % stay below, ms, by connections:",
        _by_connections(model, connections, "p99_ms", "{:.1f}"),
        f"![latency by percentile at {connections[-1]} connections]({model['picture']})",
        "Median latency, ms:",
        _by_connections(model, connections, "p50_ms", "{:.2f}"),
        "Requests per second:",
        _by_connections(model, connections, "requests_per_s", "{:,.0f}"),
        f"Ours ({OURS.partition(', ')[2]}), in times the requests per second of each:",
        _ratios(model, connections),
        *_steps(model, str(connections[-1])),
    ]


def _in_short(model: dict[str, Any], connections: Sequence[int]) -> str:
    """What is said first of one model: latency under load, then throughput, like with like, the worst case too."""
    rows = {row["title"]: row for row in model["rows"] if not row["failed"]}
    if OURS not in rows or len(rows) < 2:
        return f"- {_millions(model)}: nothing to compare."
    most, ours = str(connections[-1]), rows[OURS]
    others = {title: row for title, row in rows.items() if row["server"] != "ours"}
    p99 = {title: _median(row, most, "p99_ms") for title, row in others.items()}
    parts = [
        f"- {_millions(model)}: with {most} connections, 99 % of the requests are answered within "
        f"{_median(ours, most, 'p99_ms'):.1f} ms. Others: "
        + ", ".join(f"{title} {p99[title]:.1f}" for title in sorted(p99, key=lambda title: p99[title]))
        + "."
    ]
    if NAIVE in others:
        ratios = [_ratio(ours, others[NAIVE], num) for num in (str(connections[0]), most)]
        parts.append(
            f"Requests/s in times those of a handler that takes the same raw body: {ratios[0]:.2f} with "
            f"{connections[0]} connection, {ratios[1]:.2f} with {most}."
        )
    faster = [title for title, row in others.items() if _ratio(ours, row, most) < 1]
    if faster:
        ratios = ", ".join(f"{title} {1 / _ratio(ours, others[title], most):.2f} times" for title in faster)
        parts.append(f"More requests/s than ours with {most} connections: {ratios}.")
    return " ".join(parts)


def _steps(model: dict[str, Any], most: str) -> list[str]:
    """Where the time of one of our requests goes; nothing where ours was not measured."""
    ours = next((row for row in model["rows"] if row["title"] == OURS and not row["failed"]), None)
    if ours is None:
        return []
    whole = 1e6 / _median(ours, most, "requests_per_s")
    steps = model["steps"] | {"the rest: sockets, and two threads and their caches on one core": 0.0}
    steps[list(steps)[-1]] = whole - sum(steps.values())
    lines = [[name, f"{us:.1f}", f"{us / whole:.0%}"] for name, us in steps.items()]
    return [
        f"Where the time of a request goes, with {most} connections ({OURS}). Each part but the last is timed by "
        "itself in a process on the servers' core, without sockets (`bench/request_steps.py`):",
        table(["", "µs", ""], [*lines, ["a request", f"{whole:.1f}", "100%"]]),
    ]


def _by_connections(model: dict[str, Any], connections: Sequence[int], name: str, form: str) -> str:
    def cell(row: dict[str, Any], num: int) -> str:
        values = [load[name] for load in row["loads"][str(num)]]
        median, low, high = (form.format(of(values)) for of in (statistics.median, min, max))
        return f"{median} ({low}–{high})"

    return _rows(model, connections, cell)


def _ratios(model: dict[str, Any], connections: Sequence[int]) -> str:
    ours = next((row for row in model["rows"] if row["title"] == OURS and not row["failed"]), None)
    return _rows(model, connections, lambda row, num: f"{_ratio(ours, row, str(num)):.1f}" if ours else "")


def _rows(model: dict[str, Any], connections: Sequence[int], cell: Callable[[dict[str, Any], int], str]) -> str:
    rows = [
        [row["title"], f"failed: {row['failed']}", *[""] * (len(connections) - 1)]
        if row["failed"]
        else [row["title"], *(cell(row, num) for num in connections)]
        for row in model["rows"]
    ]
    return table(["", *map(str, connections)], rows)


def _ratio(ours: dict[str, Any], other: dict[str, Any], num: str) -> float:
    pairs = zip(ours["loads"][num], other["loads"][num], strict=True)
    return statistics.median(one["requests_per_s"] / two["requests_per_s"] for one, two in pairs)


def _bound(model: dict[str, Any], other: dict[str, Any], num: str) -> float:
    """How many times the requests of another server the model alone answers, one by one or in batches."""
    images_per_s = [
        1000 * size / statistics.median(model["alone"][name]) for name, size in (("model_1", 1), ("model_32", 32))
    ]
    return max(images_per_s) / _median(other, num, "requests_per_s")


def _median(row: dict[str, Any], num: str, name: str) -> float:
    return statistics.median(load[name] for load in row["loads"][num])


def _alone(milliseconds: list[float], batch_size: int) -> str:
    median, low, high = (1000 * batch_size / of(milliseconds) for of in (statistics.median, max, min))
    return f"{median:,.0f} ({low:,.0f}–{high:,.0f})"


def _millions(model: dict[str, Any]) -> str:
    return f"{model['macs'] / 1e6:.1f} MMAC"
