"""A page is a record and a template: bench/pages/NAME.md, written as for `str.format`, with formats for figures."""

import re
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any

from bench.page import TEMPLATES, machine_table, spread, typed_command, write_page

UNITS = {"%": (100, " %"), "M": (1e-6, ""), "ms": (1000, " ms")}
Record = Mapping[str, Any]


def publish(config: Any, name: str, page: Callable[[Record], str], *, positional: str = "", **measured: Any) -> None:
    """Write what bench/NAME.py measured, with its command line, as NAME.json, and `page` of it as NAME.md."""
    record = {"command": typed_command(f"bench/{name}.py", config, positional=positional), **measured}
    print(write_page(config.out, name, page(record), record))


def render(name: str, record: Record, /, **figures: Any) -> str:
    """The template NAME filled with a record and with `figures` derived from it.

    - "each rows | {net} | {seconds:.2f} |" is a line for each mapping in the list `rows`; "each rows NAME" is the
      template NAME for each. Where `rows` is a mapping, {name} is the key.
    - A list of numbers is written as its median, and in brackets its smallest and largest.
    - ".1f %" is a share in per cent, ",.0f M" a number in millions, ".0f ms" one of seconds.
    - A mapping is a table of names and values, or with the format "counts": "40 × 200, 1 × lost".
    - Text is written as it is, whatever its format.
    """
    fields = {**record, **figures}
    lines = [_fill(line, fields) for line in (TEMPLATES / f"{name}.md").read_text().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _fill(line: str, fields: Record) -> str:
    if not (repeated := re.fullmatch(r"each (\w+) (.+)", line)):
        return FIGURES.vformat(line, (), fields)
    rows, what = fields[repeated[1]], repeated[2]
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


class _Figures(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, Mapping):
            if format_spec == "counts":
                return ", ".join(f"{count:,} × {name}" for name, count in value.items())
            return machine_table({name: str(part) for name, part in value.items()})
        form, _, unit = format_spec.partition(" ")
        factor, sign = UNITS.get(unit, (1, ""))
        if isinstance(value, list):
            return spread([factor * number for number in value], form or ".3g") + sign
        return format(factor * value if unit else value, form) + sign


FIGURES = _Figures()
