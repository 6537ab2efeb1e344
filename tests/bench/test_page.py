import json
import re

from bench.lab.page import describe_machine, spread, table, write_page


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
