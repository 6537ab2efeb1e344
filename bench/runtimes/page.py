"""The page of bench/model.py, and the bars that the plain net is to reach."""

from dataclasses import dataclass
from typing import Any

from bench.lab.page import Record, percent, render, spread, table
from bench.lab.rounds import Timing, speedup
from bench.runtimes.racers import BASELINES, NUM_GEMM, OURS, REFERENCE

NUM_OPERATORS_SHOWN = 5


@dataclass(frozen=True)
class Column:
    """What the record of a net has for one number of threads and of images per call."""

    net: Record
    num_threads: int
    batch_size: int

    def timings(self, name: str, precision: str) -> dict[str, Timing]:
        """By title: the rows of the entrant `name` that have a timing and do not stray."""
        found = {}
        for row in self.net["rows"]:
            timing = row["timings"].get(str(self.num_threads), {}).get(str(self.batch_size))
            if (row["net"], row["precision"], row["strays"]) == (name, precision, False) and isinstance(timing, dict):
                found[row["title"]] = timing
        return found

    def fastest(self, name: str, precision: str) -> tuple[str, Timing] | None:
        """Of the rows that are not Dirac nets: the title, and the timing."""
        plain = [item for item in self.timings(name, precision).items() if item[0] not in BASELINES]
        return min(plain, key=lambda item: item[1]["median_ms"], default=None)

    def peak(self, precision: str) -> float | None:
        """Operations per second of the fastest matrix product in the same rounds; None where none ran."""
        products = self.timings("GEMM", precision).values()
        return max((1000 * 2 * NUM_GEMM[precision] ** 3 / timing["median_ms"] for timing in products), default=None)

    def share(self, macs: int, images_per_s: float, precision: str) -> float | None:
        """Of the peak, in direct convolution's operations."""
        peak = self.peak(precision)
        return 2 * macs * images_per_s / peak if peak else None

    def rate(self, macs: int, timing: Timing, precision: str) -> str:
        share = self.share(macs, timing["images_per_s"], precision)
        return f"**{timing['images_per_s']:,.0f}**" + ("" if share is None else f" ({percent(share)})")


# Precision, images per call, and the least speedup over a Dirac net in eager PyTorch; whether direct convolution at the
# peak of matrix products must be exceeded too.
BARS = (("fp32", 1, 5, False), ("fp32", 32, 2.4, True), ("int8", 1, 14, False), ("int8", 32, 5, False))


def page(record: Record) -> str:
    """The page of a record with one entry for each net."""
    nets = list(record["nets"].values())
    bars = [bar for net in nets for num_threads in net["threads"] for bar in judge_bars(net, num_threads)]
    return render(
        "model",
        record,
        entrants=[_entrant(net, entrant) for net in nets for entrant in net["entrants"]],
        bars=render("model-bars", {"bars": bars}) if bars else "Nothing was measured that a bar asks for.",
        nets=list(map(_net, nets)),
    )


def judge_bars(net: Record, num_threads: int) -> list[dict[str, str]]:
    """A line for each bar of whose rows the record of a net has timings: what the best row reaches."""
    name, macs, lines = net["entrants"][0]["name"], net["entrants"][0]["macs"], []
    for precision, size, factor, above_peak in BARS:
        column = Column(net, num_threads, size)
        timings, fastest = column.timings(name, "fp32"), column.fastest(name, precision)
        before = {baseline: timings[baseline] for baseline in BASELINES if baseline in timings}
        if not (fastest and before):
            continue
        title, best = fastest
        share = column.share(macs, best["images_per_s"], precision)
        over, demanded = dict.fromkeys(BASELINES, ""), []
        for baseline, timing in before.items():
            found = speedup(best, over=timing)
            is_met = found >= factor and (not above_peak or (share or 0) > 1)
            over[baseline] = f"{found:.2f}×, {'met' if is_met else '**not met**'}"
            demanded.append(percent(column.share(macs, factor * timing["images_per_s"], precision)))
        bar = f"{precision}, batch {size}: ≥ {factor:g}×" + " and above the peak" * above_peak
        line = {"net": f"{name}, {num_threads}", "bar": bar, "best": title, "share": percent(share)}
        over_both = {"over_reference": over[REFERENCE], "over_ours": over[OURS]}
        lines.append({**line, **over_both, "demanded": ", ".join(demanded)})
    return lines


def _entrant(net: Record, entrant: Record) -> dict[str, Any]:
    """With the fastest row of each batch and precision, with the most threads."""
    cells = {}
    for precision, size in (("fp32", 1), ("fp32", 32), ("int8", 1), ("int8", 32)):
        column = Column(net, max(net["threads"]), size)
        fastest = column.fastest(entrant["name"], precision)
        rate = f"{column.rate(entrant['macs'], fastest[1], precision)}, {fastest[0]}" if fastest else ""
        cells[f"{precision}_{size}"] = rate
    return {**entrant, **cells}


def _net(net: Record) -> dict[str, Any]:
    failed = [
        f"- {row['net']}, {row['title']}, {row['precision']}: {row['failed']}" for row in net["rows"] if row["failed"]
    ]
    parts = [f"### {_threads(num)}\n\n{_rows(net, num)}" for num in net["threads"]]
    parts += ["Rows that failed:\n\n" + "\n".join(failed)] if failed else []
    return {**net, "parts": "\n\n".join(parts), "profiles": list(map(_profile, net["profiles"]))}


def _rows(net: Record, num_threads: int) -> str:
    macs = {entrant["name"]: entrant["macs"] for entrant in net["entrants"]}
    columns = [Column(net, num_threads, size) for size in net["batches"]]
    lines = []
    for row in net["rows"]:
        if row["net"] == "GEMM":
            continue
        cells = []
        for column in columns:
            timing = row["timings"].get(str(num_threads), {}).get(str(column.batch_size))
            if isinstance(timing, dict):
                rate = column.rate(macs[row["net"]], timing, row["precision"])
                timing = f"{rate}, {spread(timing['round_ms'])}"
            cells.append(timing or "")
        error = "" if row["error"] is None else f"{row['error']:.1e}" + " **strays**" * row["strays"]
        memory = row["peak_bytes"].get(str(num_threads))
        memory = "" if memory is None else f"{memory / 1e6:,.0f} MB"
        lines.append([row["net"], f"{row['title']}, {row['precision']}", *cells, error, memory])
    peaks = [
        ", ".join(f"{kind} {peak / 1e9:.0f} GOP/s" for kind in NUM_GEMM if (peak := column.peak(kind)))
        for column in columns
    ]
    head = [f"batch {size}: images/s, share of peak, ms" for size in net["batches"]]
    return table(["net", "row", *head, "error", "memory"], [*lines, ["peak", "", *peaks, "", ""]])


def _profile(profile: Record) -> dict[str, Any]:
    slowest, total = list(profile["operators"].items())[:NUM_OPERATORS_SHOWN], sum(profile["operators"].values())
    shares = ", ".join(f"{percent(ms / total)} {name}" for name, ms in slowest)
    return {**profile, "threads": _threads(profile["num_threads"]), "total": total, "shares": shares}


def _threads(num: int) -> str:
    return "1 thread" if num == 1 else f"{num} threads"
