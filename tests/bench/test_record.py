"""How a record becomes a page: the formats of figures, repeated rows, and all pages that are kept with their record."""

import json
from pathlib import Path

import pytest

from bench import cascade, folding, gpu_check, reparameterized, training
from bench.lab import record
from bench.lab.page import render

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def template(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "TEMPLATES", tmp_path)

    def write(text, name="page"):
        (tmp_path / f"{name}.md").write_text(text)

    return write


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("{x:.2f}", 1.234, "1.23"),
        ("{x}", [4, 1, 2], "2 (1–4)"),
        ("{x:.1f %}", 0.1234, "12.3 %"),
        ("{x:.0f %}", [0.1, 0.2], "15 (10–20) %"),
        ("{x:,.0f M}", 1_234_400_000, "1,234"),
        ("{x:.2f}", "failed", "failed"),
        ("{x[a][b]}", {"a": {"b": 3}}, "3"),
        ("{x}", {"one_word": 1}, "|  |  |\n| --- | --- |\n| one word | 1 |"),
    ],
)
def test_a_figure_is_written_by_its_format(template, field, value, text):
    template(field)
    assert render("page", {"x": value}) == text + "\n"


def test_a_row_or_a_template_is_repeated_for_each_entry_of_a_list(template):
    template("# {title}\n\n{nothing}\n\neach rows | {net} | {ms:.1f} |\n\neach rows part\n")
    template("{title}: {net}\n", "part")
    rows = [{"net": "a|b", "ms": 1}, {"net": "c", "ms": 2}]
    page = render("page", {"title": "T", "rows": rows}, nothing="")
    assert page == "# T\n\n| a/b | 1.0 |\n| c | 2.0 |\n\nT: a|b\n\nT: c\n"


PAGES = {
    "benchmarks/training": training,
    "benchmarks/folding": folding,
    "benchmarks/reparameterized": reparameterized,
    "benchmarks/cascade": cascade,
    "gpu-nvidia-h200": gpu_check,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_kept_page_is_that_of_its_record(name):
    kept = json.loads((DOCS / f"{name}.json").read_text())
    assert PAGES[name].page(kept) == (DOCS / f"{name}.md").read_text()
