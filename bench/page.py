"""The page of a benchmark: Markdown with its JSON beside it, the command that made it, and the machine it ran on."""

import importlib.metadata
import json
import platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from common.cli import given_arguments
from common.cores import num_cores
from common.files import write_whole

TEMPLATES = Path(__file__).with_name("pages")


def fill(name: str, **fields: Any) -> str:
    """The template pages/NAME.md with `fields`, written as for `str.format`; an empty one leaves no gap."""
    page = (TEMPLATES / f"{name}.md").read_text().format(**fields)
    return re.sub(r"\n{3,}", "\n\n", page).rstrip() + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    # A pipe in a runtime's message would end its cell.
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def table_of(head: str, row: str, records: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of records: "name | time" and "{name} | {seconds:.1f} s", as for `str.format`."""
    return table(head.split(" | "), [[cell.format(**record) for cell in row.split(" | ")] for record in records])


def machine_table(machine: dict[str, str]) -> str:
    """The table of `describe_machine`."""
    return table(["", ""], [[name.replace("_", " "), value] for name, value in machine.items()])


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """The median, and in brackets the smallest and the largest: "2 (1–4)"."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.0f} %"


def describe_machine(*packages: str) -> dict[str, str]:
    """Processor, cores that this process may use, versions of Python and of those `packages` that are installed."""
    installed = {dist.metadata["Name"].replace("_", "-"): dist.version for dist in importlib.metadata.distributions()}
    return {
        "device": _cpu_name(),
        "cores": str(num_cores()),
        "python": platform.python_version(),
        **{name: installed[name] for name in packages if name in installed},
        "date": date.today().isoformat(),
    }


def typed_command(script: str, config: Any, *, positional: str = "") -> str:
    """The command line of `config` without --out; the field `positional` comes first and has no dashes."""
    words = [str(value) for value in getattr(config, positional)] if positional else []
    defaults = {name: getattr(type(config), name) for name in ("out", positional) if name}
    return " ".join(["python", script, *words, given_arguments(replace(config, **defaults))]).rstrip()


def write_page(folder: Path, name: str, page: str, record: dict[str, Any]) -> str:
    """Writes NAME.md and NAME.json into `folder`; returns a line that says so."""
    write_whole(folder / f"{name}.json", f"{json.dumps(record, indent=1)}\n".encode())
    return f"wrote {write_whole(folder / f'{name}.md', page.encode())} and {name}.json"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
