"""What every benchmark leaves: a page of Markdown with its JSON beside it, and the machine it ran on."""

import importlib.metadata
import json
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from common.cores import num_cores
from common.files import write_whole


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    # A pipe in a runtime's message would end its cell.
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def machine_table(machine: dict[str, str]) -> str:
    """The table of `describe_machine`."""
    return table(["", ""], [[name.replace("_", " "), value] for name, value in machine.items()])


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """The median, and in brackets the smallest and the largest: "2 (1–4)"."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


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


def write_page(folder: Path, name: str, page: str, record: dict[str, Any]) -> str:
    """NAME.md and NAME.json in `folder`; says so in one line."""
    write_whole(folder / f"{name}.json", f"{json.dumps(record, indent=1)}\n".encode())
    return f"wrote {write_whole(folder / f'{name}.md', page.encode())} and {name}.json"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"
