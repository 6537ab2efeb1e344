"""What bench/gpu_check.py recorded, as a page of Markdown."""

from typing import Any

from bench.page import machine_table, table

SAMPLE_TITLE = "SAMPLE: no GPU was measured"
SAMPLE_NOTE = (
    "**Every figure on this page is invented**; all times are 1 ms. It shows what `make gpu-check` writes, and comes "
    "from `tests/data/gpu-sample.json` by `python bench/gpu_check.py --render tests/data/gpu-sample.json`."
)


def markdown(record: dict[str, Any]) -> str:
    """The page of one record; one that is marked as a sample says so first."""
    machine = record["machine"]
    title = SAMPLE_TITLE if record["sample"] else f"Measured on {machine['device']}"
    parts = [f"# {title}", SAMPLE_NOTE] if record["sample"] else [f"# {title}"]
    parts += [
        f"Written by `{record['command']}`. A time is that of one call, from images in the host's memory to logits "
        f"there: the median of {record['rounds']} rounds of {record['round_s']:g} s that alternate between all "
        "rows, and in brackets the fastest and the slowest round. Throughput is that of calls one after another. "
        "Speedups are medians of ratios within a round. float32 is float32: TF32 is off.",
        machine_table(machine),
    ]
    if record["tests"]:
        parts.append(f"`tests/gpu`: {record['tests']['summary']}")
    for net in record["nets"]:
        parts += _net(net)
    return "\n\n".join(parts) + "\n"


def _net(net: dict[str, Any]) -> list[str]:
    rows = net["rows"]
    sizes = [str(size) for size in net["batch_sizes"]]
    first = rows[0]["title"]
    times = [[row["title"], *(_time(row, size) for size in sizes)] for row in rows]
    speeds = [[row["title"], *(_speed(row, size) for size in sizes)] for row in rows]
    parity = [[row["title"], *_parity(row["parity"])] for row in rows]
    batches = [f"batch {size}" for size in sizes]
    return [
        f"## {net['name']}, weights: {net['weights']}",
        "Milliseconds:",
        table(["", *batches], times),
        f"Images per second, and speedup over {first}:",
        table(["", *batches], speeds),
        "Parity with the plain net in float32 on the CPU; the worst kind of images that is judged:",
        table(["", "images", "largest", "rms", "top-1", "tolerance", "verdict"], parity),
    ]


def _time(row: dict[str, Any], size: str) -> str:
    timing = row["timings"].get(size)
    if timing is None:
        return "failed"  # to open; the reason stands under parity
    if isinstance(timing, str):
        return f"failed: {timing}"
    return f"{timing['median_ms']:.3g} ({min(timing['round_ms']):.3g}–{max(timing['round_ms']):.3g})"


def _speed(row: dict[str, Any], size: str) -> str:
    timing = row["timings"].get(size)
    if timing is None or isinstance(timing, str):
        return "failed"
    speedup = timing["speedup"]
    return f"{timing['images_per_s']:,.0f}" + ("" if speedup is None else f" ({speedup:.2f}×)")


def _parity(parity: dict[str, Any] | str) -> list[str]:
    if isinstance(parity, str):
        return [parity, *[""] * 5]
    return [
        f"{parity['num_images']} {parity['images']}",
        f"{parity['relative']:.1e}",
        f"{parity['rms']:.1e}",
        f"{100 * parity['top1_agreement']:.2f} %",
        parity["stated_tolerance"],
        {True: "same", False: "DIFFERENT", None: "not judged"}[parity["within_tolerance"]],
    ]
