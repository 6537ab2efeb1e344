"""What commands print: progress, and names whole and on one line."""

import io
from types import SimpleNamespace

from rich.console import Console

from common import progress
from common.progress import make_table, printable


def test_a_log_gets_a_line_every_ten_seconds_with_the_time_that_the_rest_takes(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    file = io.StringIO()
    with progress.progress(Console(file=file, width=80), "comparing", 10, done=2) as advance:
        for clock.now, note in ((4.0, "soon"), (12.0, "5 images/s"), (13.0, "again"), (22.0, "")):
            advance(2, note=note)
    # 4 steps in 12 s leave 4 of 10; then all are done.
    assert file.getvalue().splitlines() == ["comparing: 6/10, 12 s left  5 images/s", "comparing: 10/10, 0 s left"]


def test_a_terminal_gets_a_bar_that_goes_when_the_work_is_done():
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    assert list(progress.track(console, "reading")("abc", 3)) == ["a", "b", "c"]
    with progress.progress(console, "comparing", 10, done=2) as advance:
        advance(3, note="5 images/s")
    text = file.getvalue()
    assert "3/3" in text
    assert "5/10" in text
    assert "5 images/s" in text
    assert " s left" not in text


def test_a_narrow_terminal_breaks_what_differs_at_its_end(capsys):
    table = make_table("form", "error")
    table.add_row("runs/first/plain.onnx", "1.0e-06")
    table.add_row("runs/first/plain.safetensors", "2.0e-06")
    Console(width=30).print(table)
    rows = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    forms, errors = ("".join(cell.strip() for cell in column) for column in zip(*rows, strict=True))
    assert forms == "runs/first/plain.onnxruns/first/plain.safetensors"
    assert errors == "1.0e-062.0e-06"


def test_what_is_not_a_letter_is_a_question_mark():
    assert (
        printable("two\nlines, \x1b[31mred, caf\udce9, naïve, 猫\u202f") == "two?lines, ?[31mred, caf?, naïve, 猫\u202f"
    )
