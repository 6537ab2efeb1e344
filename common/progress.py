"""Progress on work longer than two seconds: a bar on a terminal, plain lines elsewhere."""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LINE_EVERY_S = 10.0


def make_console(*, json: bool = False, quiet: bool = False) -> "Console":
    """For human readers: stdout, or stderr when stdout carries JSON. Lines are never wrapped for a pipe."""
    from rich.console import Console  # not at the head, as commands answer --help without it

    stream = sys.stderr if json else sys.stdout
    width = None if stream.isatty() else 160
    return Console(file=stream, highlight=False, width=width, soft_wrap=True, markup=False, quiet=quiet)


def make_table(*headers: str) -> "Table":
    """A table that breaks what is too long for a narrow terminal: paths and names of layers differ at their ends."""
    from rich.table import Column, Table

    return Table(*(Column(header, overflow="fold") for header in headers))


def printable(text: str) -> str:
    """The text on one line, with question marks for control characters and for bytes that are not UTF-8."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text.encode(errors="replace").decode())


@contextmanager
def progress(console: "Console", what: str, total: int, *, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="")`; `done` steps of `total` are finished already."""
    if not console.is_terminal:
        yield _plain_lines(console, what, total, done)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    what_column, note_column = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (what_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note_column)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")
        yield lambda n=1, note="": bar.update(task, advance=n, note=note)


def track(console: "Console", what: str) -> Callable[[Iterable[Any], int], Iterator[Any]]:
    """A wrapper for a loop, e.g. `for path in track(console, "reading")(paths, len(paths))`."""

    def wrap(items: Iterable[Any], total: int) -> Iterator[Any]:
        with progress(console, what, total) as advance:
            for item in items:
                yield item
                advance()

    return wrap


def _plain_lines(console: "Console", what: str, total: int, done: int) -> Callable[..., None]:
    start = last = time.monotonic()
    first = done

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_EVERY_S:
            left_s = (now - start) / max(1, done - first) * (total - done)
            console.print(f"{what}: {done}/{total}, {left_s:.0f} s left  {note}".rstrip())
            last = now

    return advance
