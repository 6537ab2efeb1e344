"""What commands print: names whole on any terminal, and on one line."""

from rich.console import Console

from common.progress import make_table, printable


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
