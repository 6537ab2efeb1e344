"""docs/adding-*.md: each change and each mistake that a page shows is made in a copy of the tree, and tested there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("adding-*.md"))
COPIED = ("common", "train", "fold", "export", "serve", "tests", "models", "pyproject.toml")
BLOCK = re.compile(r"```(diff|sh|text)\n(.*?)```", flags=re.DOTALL)


def read_recipe(page):
    """(the change, the arguments of pytest, [(a mistake, what is then said)]) of a page."""
    (_, change), (_, command), *rest = [block.groups() for block in BLOCK.finditer(page.read_text())]
    program, arguments = shlex.split(command.replace("\\\n", " "))[:3], shlex.split(command.replace("\\\n", " "))[3:]
    assert program == ["python", "-m", "pytest"]
    kinds, texts = [kind for kind, _ in rest], [text for _, text in rest]
    assert kinds == ["diff", "text"] * (len(rest) // 2), f"{page.name}: {kinds}"
    return change, arguments, list(zip(texts[::2], texts[1::2], strict=True))


def patch(tree, diff, *flags):
    # Outside any repository, so that git changes the copy and not the tree that it may lie in.
    done = subprocess.run(
        ["git", "apply", "-C1", *flags, "-"],
        cwd=tree,
        input=diff,
        text=True,
        capture_output=True,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)},
    )
    assert done.returncode == 0, f"the page's diff no longer fits the code:\n{diff}\n{done.stderr}"


def run_tests(tree, arguments):
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path):
    for name in COPIED:
        source, target = ROOT / name, tmp_path / "tree" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return tmp_path / "tree"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_recipe_works_and_its_mistakes_are_noticed(page, tree):
    change, arguments, mistakes = read_recipe(page)
    assert mistakes
    patch(tree, change)
    status, output = run_tests(tree, arguments)
    assert status == 0, output
    for mistake, said in mistakes:
        patch(tree, mistake)
        failing = re.findall(r"^FAILED (\S+)", said, flags=re.MULTILINE)
        assert failing, f"{page.name} does not say which test fails with\n{mistake}"
        status, output = run_tests(tree, failing)
        assert status == 1, f"nothing fails with\n{mistake}\n{output}"
        assert not [line for line in said.splitlines() if line not in output], output
        patch(tree, mistake, "--reverse")


def test_there_is_a_recipe_for_each_thing_that_grows():
    assert [page.stem for page in PAGES] == ["adding-a-family", "adding-a-lowering", "adding-a-runtime"]
