"""The bars that a record's parts promise to meet, under "bars" in each: their table, and the status of a command."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.page import table


def counts(of: Mapping[str, int]) -> str:
    """Numbers of replies by status: "40 × 200, 1 × lost"."""
    return ", ".join(f"{count:,} × {name}" for name, count in of.items())


def bars_table(titles: Mapping[str, str], record: Mapping[str, Any]) -> str:
    """A row for each bar of a record's parts, under their titles."""
    rows = [(title, bar, met) for name, title in titles.items() for bar, met in bars_of(record[name]).items()]
    return table(("", "bar", ""), [(title, bar, "met" if met else "MISSED") for title, bar, met in rows])


def report_missed(record: Mapping[str, Any], parts: Iterable[str]) -> int:
    """Print the bars of `parts` that were missed; the exit status of a command."""
    missed = [f"missed: {name}: {bar}" for name in parts for bar, met in bars_of(record[name]).items() if not met]
    print("\n".join(missed), end="\n" if missed else "")
    return int(bool(missed))


def bars_of(part: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """The bars of a part, each with whether every round met it."""
    rounds = [part] if isinstance(part, Mapping) else part
    return {bar: all(one["bars"][bar] for one in rounds) for bar in rounds[0]["bars"]}
