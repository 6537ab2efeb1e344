"""The arrows between the stages, and names that would shadow a library."""

import ast
import importlib.metadata
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("common", "train", "fold", "export", "serve")
FILES = sorted(path for stage in STAGES for path in (ROOT / stage).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES if path.stem != "__init__"}


def imported(path):
    """Modules that a file imports anywhere, functions and what is for types alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # where it is a module


def test_a_stage_imports_no_later_stage():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES
        for module in imported(path)
        if (first := module.split(".")[0]) in STAGES
        and STAGES.index(first) > STAGES.index(path.relative_to(ROOT).parts[0])
    ]
    assert not wrong, "what both need belongs to the earlier stage"


def test_no_two_modules_import_each_other():
    """A CycleError names the modules in its round."""
    arrows = {name: MODULES.keys() & imported(path) for name, path in MODULES.items()}
    TopologicalSorter(arrows).prepare()


# The runtime that is PyTorch itself: export/runtimes/load.py imports it where it is chosen by name.
NEED_TORCH = ("export.runtimes.torch_graphs",)
RUNTIMES = [name for name in MODULES if name.startswith("export.runtimes.") and name not in NEED_TORCH]
SERVE = ", ".join(name for name in MODULES if name.startswith("serve."))


@pytest.mark.slow
@pytest.mark.parametrize("modules", [SERVE, *RUNTIMES], ids=["all of serve", *RUNTIMES])
def test_serving_runs_without_torch(modules):
    program = f"import sys; sys.modules['torch'] = None; import {modules}; assert 'torchvision' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_runtime_that_needs_torch_is_imported_where_it_is_chosen_and_nowhere_else():
    readers = {name for name, path in MODULES.items() if {*NEED_TORCH} & {*imported(path)}}
    assert readers <= {"export.runtimes.load", *NEED_TORCH}


@pytest.mark.parametrize("module", ["common.spec", "common.cli", "common.refusal"])
def test_what_all_stages_share_needs_only_the_standard_library(module):
    names = set(imported(ROOT / (module.replace(".", "/") + ".py")))
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "common"}


def test_no_module_is_named_like_a_library_a_standard_module_or_a_stage():
    taken = {*sys.stdlib_module_names, *STAGES, *importlib.metadata.packages_distributions()}
    own = {path.relative_to(ROOT) for path in FILES if path.stem in taken and path.stem != "__init__"}
    assert not own


def test_inits_are_empty():
    assert all(path.stat().st_size == 0 for path in FILES if path.name == "__init__.py")


def test_no_module_is_longer_than_a_reader_has_patience():
    lines = {
        path: len(path.read_text().splitlines())
        for part in (*STAGES, "bench", "tests")
        for path in (ROOT / part).rglob("*.py")
    }
    assert {path.name: num for path, num in lines.items() if num > 400} == {}, "part these by subject"


COMMANDS = [path for path in FILES if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_runs_from_any_folder_and_helps_without_torch(path, tmp_path):
    """Nor with rich, which takes as long to import as all that a command needs for its help."""
    program = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['rich'] = None; "
        f"sys.argv = [{str(path)!r}, '--help']; sys.path[0] = {str(path.parent)!r}; "
        f"runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
