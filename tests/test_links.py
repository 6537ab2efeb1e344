"""The pages lead where they say: links, headings, and the functions that they name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "models" / "README.md", *DOCS]
BLOCK = re.compile(r"^ *```.*?^ *```", flags=re.DOTALL | re.MULTILINE)


def prose(page):
    return BLOCK.sub("", page.read_text())


def anchors(page):
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def leads_nowhere(page, link):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return not target.exists() or bool(anchor and anchor not in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(((?!https?:|mailto:)[^)\s]+)\)", prose(page))
    assert not [link for link in links if leads_nowhere(page, link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_function_that_is_said_to_be_in_a_file_is_there(page):
    named = re.findall(r"`(\w+)` in\s+\[`([^`]+\.py)`\]", prose(page))
    assert not [
        (name, path)
        for name, path in named
        if not re.search(rf"^ *((async )?def|class) {name}\b", (ROOT / path).read_text(), flags=re.MULTILINE)
    ]


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.name for page in DOCS if page.parent == ROOT / "docs"]
    listed = [name for name in pages if name != "README.md" and not name.startswith("gpu-")]  # make gpu-check adds such
    assert not [name for name in listed if f"]({name})" not in index]


def test_every_picture_is_shown_somewhere():
    shown = "".join(page.read_text() for page in PAGES)
    pictures = [path.name for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".svg")]
    assert not [name for name in pictures if name not in shown]
