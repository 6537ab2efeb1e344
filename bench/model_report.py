"""What bench/model.py recorded, as a page of Markdown."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from bench.bars import Verdict, judge, peak
from bench.layer_profile import CONVOLUTIONS, LAYOUTS
from bench.model_rows import BASELINES
from bench.page import machine_table, table
from bench.rounds import Timing

NUM_LAYERS_SHOWN = 6
INTRODUCTION = """\
Images go in as uint8 `[N, H, W, C]` in the host's memory, logits come out there; normalisation is inside every form. \
Every row runs in a process of its own, whose number of threads is set before its libraries load. The processes take \
turns: one round each, forwards, then backwards. A round's time is the median of its calls, a row's the median of its \
rounds; in brackets are its fastest and slowest round. Speedups are medians of the ratios within a round.

All weights are random: they change no time, and no accuracy is measured here. *Error*: of the logits of the same \
images, against the plain net in PyTorch and float32; in fp32 the largest difference as a share of the largest logit, \
in int8 root mean squares without the mean over classes, which on random weights say little. A row in fp32 beyond \
1e-4 is marked as straying and counts for no bar. *Peak*: operations of the fastest matrix product of the same \
precision in the same rounds; a row's share of it is in the operations of direct convolution (2 × MACs of the plain \
net), whatever the row computes. So Winograd's method, and a lowering that computes more, show for what they are: \
above or below. *Memory* is the most that the process held, libraries and \
all, and for MNN the sum with the processes that it computes in.

What eight bits lose is measured on a trained net: 0.00 points of test accuracy on the one in `models/` \
([results.md](../results.md)); at most 0.3 are allowed."""
EQUAL_ERROR = """\
Images/s of the fastest row of each net with the most threads, and its share of the peak. Two things are not the case \
here. A plain net does not run nearer to the peak than one with skips: for one image in fp32 both are at 80 to 100 %. \
And a DiracNet is not faster at equal error: Wide ResNets reach the same error with 0.54 to 0.61 of the \
multiplications, and ResNet-18 a lower one at about the speed of 18-0.75. What folding gains is against the net that \
was trained, and stands under *Bars*. RepVGG, which the same fold makes plain, has both: the lowest error of the three \
ImageNet nets, and the most images/s."""
BARS_INTRODUCTION = """\
The best row of each precision, in times the speed of the Dirac net in eager PyTorch, which is fp32 in every bar. The \
last column is where the bar itself lies for that machine's eager PyTorch, over each of the two in turn: eager's own \
share of the peak, times the bar. Above 100 % no direct convolution reaches it, however it is written."""


def markdown(record: Mapping[str, Any]) -> str:
    """The page of a record with one entry for each net."""
    nets = record["nets"].values()
    parts = ["# The plain net against its Dirac net, runtimes and other nets", INTRODUCTION]
    parts += ["## At equal error", f"{EQUAL_ERROR}\n\n{_equal_error(list(nets))}", "## Bars"]
    bars = [line for net in nets for num_threads in net["threads"] for line in _bars(net, num_threads)]
    head = ["net, threads", "bar", "best row", *(f"over {_short(name)}" for name in BASELINES)]
    parts.append(
        f"{BARS_INTRODUCTION}\n\n{table([*head, 'share of peak', 'share the bar asks for'], bars)}"
        if bars
        else "Nothing was measured that a bar asks for."
    )
    for net in nets:
        parts += _net(net)
    return "\n\n".join(parts) + "\n"


def _equal_error(nets: Sequence[Mapping[str, Any]]) -> str:
    """For each net and its rivals: published error, multiplications, fastest row of each batch and precision."""
    columns = [("fp32", 1), ("fp32", 32), ("int8", 1), ("int8", 32)]
    lines = []
    for net in nets:
        num_threads = max(net["threads"])
        for entrant in net["entrants"]:
            cells = [_fastest(net, entrant, num_threads, *column) for column in columns]
            lines.append([entrant["name"], entrant["published"], f"{entrant['macs'] / 1e6:,.0f} M", *cells])
    return table(["net", "published", "MACs", *(f"{precision}, batch {size}" for precision, size in columns)], lines)


def _fastest(
    net: Mapping[str, Any], entrant: Mapping[str, Any], num_threads: int, precision: str, batch_size: int
) -> str:
    """Images/s, share of the peak and title of the fastest row that does not stray and is no Dirac net."""
    limit, found = peak(net, precision, num_threads, batch_size), []
    for row in net["rows"]:
        record = row["timings"].get(str(num_threads), {}).get(str(batch_size))
        is_plain = row["title"] not in BASELINES and not row["strays"]
        if (row["net"], row["precision"]) == (entrant["name"], precision) and is_plain and isinstance(record, dict):
            found.append((Timing.from_dict(record).images_per_s, row["title"]))
    if not found:
        return ""
    images_per_s, title = max(found)
    share = f" ({_percent(2 * entrant['macs'] * images_per_s / limit)})" if limit else ""
    return f"**{images_per_s:,.0f}**{share}, {title}"


def _bars(net: Mapping[str, Any], num_threads: int) -> list[list[str]]:
    """A line for each bar: what the best row reaches, over each baseline."""
    lines = []
    for bar, group in groupby(judge(net, num_threads), key=lambda verdict: verdict.bar):
        verdicts = {verdict.baseline: verdict for verdict in group}
        first = next(iter(verdicts.values()))
        lines.append(
            [
                f"{net['entrants'][0]['name']}, {num_threads}",
                f"{bar.precision}, batch {bar.batch_size}: ≥ {bar.factor:g}×" + " and above the peak" * bar.above_peak,
                first.best,
                *(_speedup(verdicts.get(name)) for name in BASELINES),
                _percent(first.share),
                ", ".join(_percent(verdict.share_demanded) for verdict in verdicts.values()),
            ]
        )
    return lines


def _speedup(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return f"{verdict.speedup:.2f}×, " + ("met" if verdict.is_met else "**not met**")


def _net(net: Mapping[str, Any]) -> list[str]:
    entrants = [
        [
            entrant["name"],
            f"{entrant['macs'] / 1e6:,.1f} M",
            f"{entrant['parameters'] / 1e6:.2f} M",
            entrant["published"],
        ]
        for entrant in net["entrants"]
    ]
    parts = [
        f"## {net['entrants'][0]['name']}",
        f"`{net['command']}`: {net['rounds']} rounds of {net['round_s']:g} s.",
        machine_table(net["machine"]),
        table(["net", "MACs", "parameters, folded", "published accuracy"], entrants),
    ]
    for num_threads in net["threads"]:
        parts += _rows(net, num_threads)
    failures = [
        f"- {row['net']}, {row['title']}, {row['precision']}: {row['failed']}" for row in net["rows"] if row["failed"]
    ]
    if failures:
        parts += ["Rows that failed:", "\n".join(failures)]
    for profile in net["profiles"]:
        parts += _profile(profile)
    return parts


def _rows(net: Mapping[str, Any], num_threads: int) -> list[str]:
    """The table of one number of threads."""
    batches = net["batches"]
    macs = {entrant["name"]: entrant["macs"] for entrant in net["entrants"]}
    limits = {(kind, size): peak(net, kind, num_threads, size) for kind in ("fp32", "int8") for size in batches}
    lines = []
    for row in net["rows"]:
        times = row["timings"].get(str(num_threads), {})
        if row["net"] == "GEMM":
            continue
        cells = [_speed(times.get(str(size)), 2 * macs[row["net"]], limits[row["precision"], size]) for size in batches]
        memory = row["peak_bytes"].get(str(num_threads))
        lines.append(
            [
                row["net"],
                f"{row['title']}, {row['precision']}",
                *cells,
                _error(row),
                "" if memory is None else f"{memory / 1e6:,.0f} MB",
            ]
        )
    peaks = ["peak", "", *(_peaks(limits, size) for size in batches), "", ""]
    head = ["net", "row", *(f"batch {size}: images/s, share of peak, ms" for size in batches), "error", "memory"]
    return [f"### {_threads(num_threads)}", table(head, [*lines, peaks])]


def _speed(record: Mapping[str, Any] | str | None, operations: int, limit: float | None) -> str:
    if not isinstance(record, Mapping):
        return record or ""
    timing = Timing.from_dict(record)
    share = f" ({_percent(operations * timing.images_per_s / limit)})" if limit else ""
    spread = f"{timing.median_ms:.3g} ({min(timing.round_ms):.3g}–{max(timing.round_ms):.3g})"
    return f"**{timing.images_per_s:,.0f}**{share}, {spread}"


def _peaks(limits: Mapping[tuple[str, int], float | None], size: int) -> str:
    kinds = [f"{kind} {limit / 1e9:.0f} GOP/s" for kind in ("fp32", "int8") if (limit := limits[kind, size])]
    return ", ".join(kinds)


def _error(row: Mapping[str, Any]) -> str:
    if row["error"] is None:
        return ""
    return f"{row['error']:.1e}" + (" **strays**" if row["strays"] else "")


def _profile(profile: Mapping[str, Any]) -> list[str]:
    operators = profile["operators"]
    total = sum(operators.values())
    shares = {
        "convolutions": sum(operators.get(name, 0.0) for name in CONVOLUTIONS) / total,
        "changes of layout": sum(operators.get(name, 0.0) for name in LAYOUTS) / total,
    }
    rest = [(name, ms) for name, ms in operators.items() if name not in (*CONVOLUTIONS, *LAYOUTS)]
    shown = [*(f"{_percent(share)} {name}" for name, share in shares.items())]
    shown += [f"{_percent(ms / total)} {name}" for name, ms in rest[:3]]
    parts = [
        f"ONNX Runtime's own profile of *{profile['title']}*, batch {profile['batch_size']}, "
        f"{_threads(profile['num_threads'])}: {total:.3g} ms in nodes; {', '.join(shown)}."
    ]
    layers: Sequence[Mapping[str, Any]] = profile["layers"]
    # In eight bits the kernel keeps the filters in a layout of its own, and no shape of theirs is known.
    if sum(layer["ms"] for layer in layers) > total * shares["convolutions"] / 2:
        lines = [
            [
                "×".join(map(str, layer["weight"])),
                "×".join(map(str, layer["output"])),
                str(layer["num_layers"]),
                f"{layer['ms']:.3g}",
                f"{layer['gflop_per_s']:.0f}",
            ]
            for layer in layers[:NUM_LAYERS_SHOWN]
        ]
        parts.append(table(["filters", "output", "convolutions", "ms", "GFLOP/s"], lines))
    return parts


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.0f} %"


def _threads(num: int) -> str:
    return "1 thread" if num == 1 else f"{num} threads"


def _short(baseline: str) -> str:
    return baseline.removeprefix("PyTorch eager, ")
