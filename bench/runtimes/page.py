"""The page of bench/model.py, and the bars that the plain net is to reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.page import fill, machine_table, percent, spread, table
from bench.rounds import Timing
from bench.runtimes.racers import BASELINES, NUM_GEMM

CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv")
LAYOUTS = ("ReorderInput", "ReorderOutput", "Transpose")
NUM_LAYERS_SHOWN = 6


@dataclass(frozen=True)
class Bar:
    precision: str
    batch_size: int
    factor: float  # least speedup over a Dirac net in eager PyTorch
    above_peak: bool = False  # whether direct convolution at the peak of matrix products must be exceeded too


BARS = (Bar("fp32", 1, 5), Bar("fp32", 32, 2.4, above_peak=True), Bar("int8", 1, 14), Bar("int8", 32, 5))


@dataclass(frozen=True)
class Verdict:
    """One bar against one baseline. Shares are of the peak of `bar.precision`, in direct convolution's operations."""

    bar: Bar
    baseline: str
    best: str  # title of the fastest row
    speedup: float
    share: float | None  # of the best row; None where no product was measured
    share_demanded: float | None  # what `bar.factor` times the baseline would be: above 1 no direct convolution does it

    @property
    def is_met(self) -> bool:
        return self.speedup >= self.bar.factor and (not self.bar.above_peak or (self.share or 0) > 1)


def judge(net: Mapping[str, Any], num_threads: int) -> list[Verdict]:
    """All bars of whose rows the record of a net has timings; rows that stray do not count."""
    entrant, verdicts = net["entrants"][0], []
    for bar in BARS:
        candidates = _plain_timings(net, entrant["name"], bar.precision, num_threads, bar.batch_size)
        if not candidates:
            continue
        best = min(candidates, key=lambda title: candidates[title].median_ms)
        limit, operations = peak(net, bar.precision, num_threads, bar.batch_size), 2 * entrant["macs"]
        before = timings(net, entrant["name"], "fp32", num_threads, bar.batch_size)
        for baseline in (name for name in BASELINES if name in before):
            share = operations * candidates[best].images_per_s / limit if limit else None
            demanded = bar.factor * operations * before[baseline].images_per_s / limit if limit else None
            speedup = candidates[best].speedup_over(before[baseline])
            verdicts.append(Verdict(bar, baseline, best, speedup, share, demanded))
    return verdicts


def timings(
    net: Mapping[str, Any], name: str, precision: str, num_threads: int, batch_size: int, *, strays: bool = True
) -> dict[str, Timing]:
    """By title: the rows of the entrant `name` in a precision that have a timing; without `strays` the right ones."""
    found = {}
    for row in net["rows"]:
        timing = row["timings"].get(str(num_threads), {}).get(str(batch_size))
        is_asked = (row["net"], row["precision"]) == (name, precision) and (strays or not row["strays"])
        if is_asked and isinstance(timing, dict):
            found[row["title"]] = Timing.from_dict(timing)
    return found


def peak(net: Mapping[str, Any], precision: str, num_threads: int, batch_size: int) -> float | None:
    """Operations per second of the fastest matrix product that ran in the same rounds; None where none ran."""
    products = timings(net, "GEMM", precision, num_threads, batch_size).values()
    return max((1000 * 2 * NUM_GEMM[precision] ** 3 / timing.median_ms for timing in products), default=None)


def markdown(record: Mapping[str, Any]) -> str:
    """The page of a record with one entry for each net."""
    nets = list(record["nets"].values())
    lines = [line for net in nets for num_threads in net["threads"] for line in _bars(net, num_threads)]
    head = ["net, threads", "bar", "best row", *(f"over {name.removeprefix('PyTorch eager, ')}" for name in BASELINES)]
    head += ["share of peak", "share the bar asks for"]
    return fill(
        "model",
        equal_error=_equal_error(nets),
        bars=fill("model-bars", bars=table(head, lines)) if lines else "Nothing was measured that a bar asks for.",
        nets="\n\n".join(part for net in nets for part in _net(net)),
    )


def _equal_error(nets: Sequence[Mapping[str, Any]]) -> str:
    """For each net and its rivals: published error, multiplications, fastest row of each batch and precision."""
    columns = [("fp32", 1), ("fp32", 32), ("int8", 1), ("int8", 32)]
    lines = []
    for net in nets:
        for entrant in net["entrants"]:
            cells = [_fastest(net, entrant, *column) for column in columns]
            lines.append([entrant["name"], entrant["published"], f"{entrant['macs'] / 1e6:,.0f} M", *cells])
    return table(["net", "published", "MACs", *(f"{precision}, batch {size}" for precision, size in columns)], lines)


def _fastest(net: Mapping[str, Any], entrant: Mapping[str, Any], precision: str, batch_size: int) -> str:
    """Images/s with the most threads, share of the peak and title of the fastest row."""
    column = (precision, max(net["threads"]), batch_size)
    found = _plain_timings(net, entrant["name"], *column)
    if not found:
        return ""
    images_per_s, title = max((timing.images_per_s, title) for title, timing in found.items())
    return f"**{images_per_s:,.0f}**{_share(entrant, images_per_s, peak(net, *column))}, {title}"


def _plain_timings(net: Mapping[str, Any], name: str, *column: Any) -> dict[str, Timing]:
    """Of the rows that do not stray and are not Dirac nets."""
    found = timings(net, name, *column, strays=False)
    return {title: timing for title, timing in found.items() if title not in BASELINES}


def _share(entrant: Mapping[str, Any], images_per_s: float, limit: float | None) -> str:
    return f" ({percent(2 * entrant['macs'] * images_per_s / limit)})" if limit else ""


def _bars(net: Mapping[str, Any], num_threads: int) -> list[list[str]]:
    """A line for each bar: what the best row reaches, over each baseline."""
    judged, lines = judge(net, num_threads), []
    for bar in dict.fromkeys(verdict.bar for verdict in judged):
        verdicts = {verdict.baseline: verdict for verdict in judged if verdict.bar == bar}
        first = next(iter(verdicts.values()))
        speedups = [
            f"{verdict.speedup:.2f}×, " + ("met" if verdict.is_met else "**not met**") if verdict else ""
            for verdict in map(verdicts.get, BASELINES)
        ]
        text = f"{bar.precision}, batch {bar.batch_size}: ≥ {bar.factor:g}×" + " and above the peak" * bar.above_peak
        demanded = ", ".join(percent(verdict.share_demanded) for verdict in verdicts.values())
        name = f"{net['entrants'][0]['name']}, {num_threads}"
        lines.append([name, text, first.best, *speedups, percent(first.share), demanded])
    return lines


def _net(net: Mapping[str, Any]) -> list[str]:
    entrants = [
        [row["name"], f"{row['macs'] / 1e6:,.1f} M", f"{row['parameters'] / 1e6:.2f} M", row["published"]]
        for row in net["entrants"]
    ]
    failures = [
        f"- {row['net']}, {row['title']}, {row['precision']}: {row['failed']}" for row in net["rows"] if row["failed"]
    ]
    return [
        f"## {net['entrants'][0]['name']}",
        f"`{net['command']}`: {net['rounds']} rounds of {net['round_s']:g} s.",
        machine_table(net["machine"]),
        table(["net", "MACs", "parameters, folded", "published accuracy"], entrants),
        *(part for num_threads in net["threads"] for part in _rows(net, num_threads)),
        *(["Rows that failed:", "\n".join(failures)] if failures else []),
        *(part for profile in net["profiles"] for part in _profile(profile)),
    ]


def _rows(net: Mapping[str, Any], num_threads: int) -> list[str]:
    """The table of one number of threads."""
    batches, entrants = net["batches"], {entrant["name"]: entrant for entrant in net["entrants"]}
    limits = {(kind, size): peak(net, kind, num_threads, size) for kind in ("fp32", "int8") for size in batches}
    lines = []
    for row in net["rows"]:
        if row["net"] == "GEMM":
            continue
        times = row["timings"].get(str(num_threads), {})
        cells = [_speed(times.get(str(size)), entrants[row["net"]], limits[row["precision"], size]) for size in batches]
        error = "" if row["error"] is None else f"{row['error']:.1e}" + " **strays**" * row["strays"]
        memory = row["peak_bytes"].get(str(num_threads))
        memory = "" if memory is None else f"{memory / 1e6:,.0f} MB"
        lines.append([row["net"], f"{row['title']}, {row['precision']}", *cells, error, memory])
    peaks = [
        ", ".join(f"{kind} {limit / 1e9:.0f} GOP/s" for kind in ("fp32", "int8") if (limit := limits[kind, size]))
        for size in batches
    ]
    head = ["net", "row", *(f"batch {size}: images/s, share of peak, ms" for size in batches), "error", "memory"]
    return [f"### {_threads(num_threads)}", table(head, [*lines, ["peak", "", *peaks, "", ""]])]


def _speed(record: Mapping[str, Any] | str | None, entrant: Mapping[str, Any], limit: float | None) -> str:
    if not isinstance(record, Mapping):
        return record or ""
    timing = Timing.from_dict(record)
    return f"**{timing.images_per_s:,.0f}**{_share(entrant, timing.images_per_s, limit)}, {spread(timing.round_ms)}"


def _profile(profile: Mapping[str, Any]) -> list[str]:
    operators = profile["operators"]
    total = sum(operators.values())
    convolutions, layouts = (sum(operators.get(name, 0.0) for name in kind) for kind in (CONVOLUTIONS, LAYOUTS))
    others = [(name, ms) for name, ms in operators.items() if name not in (*CONVOLUTIONS, *LAYOUTS)]
    kinds = [("convolutions", convolutions), ("changes of layout", layouts), *others[:3]]
    parts = [
        f"ONNX Runtime's own profile of *{profile['title']}*, batch {profile['batch_size']}, "
        f"{_threads(profile['num_threads'])}: {total:.3g} ms in nodes; "
        f"{', '.join(f'{percent(ms / total)} {name}' for name, ms in kinds)}."
    ]
    layers: Sequence[Mapping[str, Any]] = profile["layers"]
    # In eight bits the kernel keeps the filters in a layout of its own, and their shapes are not known.
    if sum(layer["ms"] for layer in layers) > convolutions / 2:
        lines = [
            [
                *("×".join(map(str, layer[shape])) for shape in ("weight", "output")),
                str(layer["num_layers"]),
                f"{layer['ms']:.3g}",
                f"{layer['gflop_per_s']:.0f}",
            ]
            for layer in layers[:NUM_LAYERS_SHOWN]
        ]
        parts.append(table(["filters", "output", "convolutions", "ms", "GFLOP/s"], lines))
    return parts


def _threads(num: int) -> str:
    return "1 thread" if num == 1 else f"{num} threads"
