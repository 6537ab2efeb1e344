"""A page is a record, written as JSON, and a template: bench/pages/NAME.md, written as for `str.format`."""

import json
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from string import Formatter
from typing import Any

from common.cli import given_arguments
from common.environment import num_cores, processor, versions
from common.files import write_whole
from common.refusal import Refusal

TEMPLATES = Path(__file__).resolve().parents[1] / "pages"
UNITS = {"%": (100, " %"), "M": (1e-6, ""), "m": (1000, "")}
Record = Mapping[str, Any]


class Measurement:
    """The base of a command line whose numbers must be positive, and whose lists are empty only by default."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            flag, default = f"--{name.replace('_', '-')}", getattr(type(self), name)
            if value == () != default:
                raise Refusal(f"{flag} needs at least one value")
            values = value if isinstance(value, tuple) else (value,)
            if any(type(one) in (int, float) and one <= 0 for one in values):
                raise Refusal(f"{flag} must be positive")


def publish(config: Any, name: str, page: Callable[[Record], str], **measured: Any) -> None:
    """Write what bench/NAME.py measured, with its command line, as NAME.json, and `page` of it as NAME.md."""
    record = {"command": typed_command(f"bench/{name.replace('-', '_')}.py", config), **measured}
    print(write_page(config.out, name, page(record), record))


def write_page(folder: Path, name: str, page: str, record: Record | Sequence[Record]) -> str:
    """Writes NAME.md and NAME.json into `folder`; returns a line that says so."""
    write_whole(folder / f"{name}.json", f"{json.dumps(record, indent=1)}\n".encode())
    return f"wrote {write_whole(folder / f'{name}.md', page.encode())} and {name}.json"


def typed_command(script: str, config: Any) -> str:
    """The command line of `config` without --out."""
    return f"python {script} {given_arguments(replace(config, out=type(config).out))}".rstrip()


def describe_machine(*packages: str) -> dict[str, str]:
    """Processor, cores that this process may use, versions of Python and of those `packages` that are installed."""
    return {
        "device": processor() or "CPU",
        "cores": str(num_cores()),
        "python": platform.python_version(),
        **versions(*packages),
        "date": date.today().isoformat(),
    }


# From a record to Markdown


def render(name: str, record: Record, /, **figures: Any) -> str:
    """The template NAME filled with a record and with `figures` derived from it.

    - "each rows | {net} | {seconds:.2f} |" is a line for each mapping in the list `rows`; "each rows NAME" is the
      template NAME for each. Where `rows` is a mapping, {name} is the key.
    - A list of numbers is written as its median, and in brackets its smallest and largest. {rounds[seconds]} is that of
      a list of mappings.
    - ".1f %" is a share in per cent, ",.0f M" a number in millions, ".0f m" in thousandths.
    - A mapping is a table of names and values, or with the format "counts": "40 × 200, 1 × lost".
    - Text is written as it is, whatever its format; True and False are yes and no.
    """
    fields = _with_columns({**record, **figures})
    lines = [_fill(line, fields) for line in (TEMPLATES / f"{name}.md").read_text().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _fill(line: str, fields: Record) -> str:
    if not (repeated := re.fullmatch(r"each (\S+) (.+)", line)):
        return FIGURES.vformat(line, (), fields)
    (rows, _), what = FIGURES.get_field(repeated[1], (), fields), repeated[2]
    if isinstance(rows, Mapping):
        rows = [{"name": name, **row} for name, row in rows.items()]
    if not what.startswith("|"):
        return "\n".join(render(what, fields, **row) for row in rows)
    # A pipe in a runtime's message would end its cell.
    cells = (
        {key: value.replace("|", "/") if isinstance(value, str) else value for key, value in row.items()}
        for row in rows
    )
    return "\n".join(FIGURES.vformat(what, (), {**fields, **row}) for row in cells)


class _Column(list[Any]):
    """A list of mappings whose fields are lists."""

    def __getitem__(self, key: Any) -> Any:
        return _Column(row[key] for row in self) if isinstance(key, str) else super().__getitem__(key)


def _with_columns(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_columns(part) for key, part in value.items()}
    return _Column(map(_with_columns, value)) if isinstance(value, list) else value


class _Figures(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, Mapping):
            if format_spec == "counts":
                return ", ".join(f"{count:,} × {name}" for name, count in value.items())
            return table(["", ""], [[name.replace("_", " "), str(part)] for name, part in value.items()])
        form, _, unit = format_spec.partition(" ")
        factor, sign = UNITS.get(unit, (1, ""))
        if isinstance(value, list):
            return spread([factor * number for number in value], form or ".3g") + sign
        return format(factor * value if unit else value, form) + sign


FIGURES = _Figures()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    # A pipe in a runtime's message would end its cell.
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """The median, and in brackets the smallest and the largest: "2 (1–4)"."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.0f} %"


# Bars: what the parts of a record promise to meet, under "bars" in each


def bars_table(titles: Mapping[str, str], record: Record) -> str:
    """A row for each bar of the parts of a record, which have `titles`; it is met if every round met it."""
    rows = [(title, bar, met) for name, title in titles.items() for bar, met in _bars(record.get(name, [])).items()]
    return table(("", "bar", ""), [(title, bar, "met" if met else "MISSED") for title, bar, met in rows])


def report_missed(record: Record, parts: Iterable[str]) -> int:
    """Print the bars of `parts` that were missed; the exit status of a command."""
    missed = [f"missed: {name}: {bar}" for name in parts for bar, met in _bars(record[name]).items() if not met]
    print("\n".join(missed), end="\n" if missed else "")
    return int(bool(missed))


def _bars(part: Record | Sequence[Record]) -> dict[str, bool]:
    rounds = [part] if isinstance(part, Mapping) else part
    return {bar: all(one["bars"][bar] for one in rounds) for one in rounds[:1] for bar in one["bars"]}
