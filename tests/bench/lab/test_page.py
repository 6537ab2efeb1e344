"""How a record becomes a page: the formats of figures, repeated rows, and all pages that are kept with their record."""

import json
import re
from pathlib import Path

import pytest

from bench import cascade, folding, front_ends, gpu_check, reparameterized, startup, training
from bench.lab import page as lab
from bench.lab.page import describe_machine, render, spread, table, write_page
from bench.runtimes import page as runtimes
from bench.servers import page as servers

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture
def template(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "TEMPLATES", tmp_path)

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
        ("{x:.0f m} ms", 0.25, "250 ms"),
        ("{x[a]}", [{"a": 4}, {"a": 1}, {"a": 2}], "2 (1–4)"),
        ("{x[0][a]}", [{"a": True}], "yes"),
        ("{x:counts}", {"200": 1234, "lost": 1}, "1,234 × 200, 1 × lost"),
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


def test_a_row_of_a_mapping_has_its_key(template):
    template("each part[rows] | {name} | {ms} |")
    assert render("page", {"part": {"rows": {"a": {"ms": 1}, "b": {"ms": 2}}}}) == "| a | 1 |\n| b | 2 |\n"


PAGES = {
    "benchmarks/model": runtimes,
    "benchmarks/server": servers,
    "benchmarks/training": training,
    "benchmarks/folding": folding,
    "benchmarks/reparameterized": reparameterized,
    "benchmarks/cascade": cascade,
    "benchmarks/startup": startup,
    "benchmarks/front-ends": front_ends,
    "gpu-nvidia-h200": gpu_check,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_kept_page_is_that_of_its_record(name):
    kept = json.loads((DOCS / f"{name}.json").read_text())
    assert PAGES[name].page(kept) == (DOCS / f"{name}.md").read_text()


def test_a_pipe_does_not_end_a_cell():
    assert table(["a", "b"], [["1", "x|y"]]) == "| a | b |\n| --- | --- |\n| 1 | x/y |"


def test_a_spread_is_the_median_and_both_ends():
    assert spread([4, 1, 2]) == "2 (1–4)"
    assert spread([1234.5, 1000], ",.0f") == "1,117 (1,000–1,234)"


def test_the_machine_says_what_is_installed_and_nothing_of_what_is_not():
    machine = describe_machine("torch", "no-such-package")
    assert re.match(r"\d+\.\d+", machine["torch"])
    assert "no-such-package" not in machine
    assert int(machine["cores"]) >= 1


def test_a_page_has_its_json_beside_it(tmp_path):
    assert write_page(tmp_path / "new", "name", "# Page\n", {"a": 1}).endswith("name.md and name.json")
    assert (tmp_path / "new" / "name.md").read_text() == "# Page\n"
    assert json.loads((tmp_path / "new" / "name.json").read_text()) == {"a": 1}
