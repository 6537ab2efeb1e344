"""python tests/mutation.py: plant faults, one at a time, and name those that no test finds.

A fault is one changed expression in any stage: a comparison turned round, a sign, a bound, a
`not` left out, a call left out. Each is planted in a copy of the tree, and the tests that import its module are run,
the quick ones first. Which faults are planted follows from the seed alone.
"""

import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from common.cli import run_command
from common.refusal import Refusal

EXAMPLES = (
    "python tests/mutation.py                                  # 40 faults: about a quarter of an hour on two cores",
    "python tests/mutation.py --modules fold/proof.py --num 0  # all faults of one module",
)
STAGES = ("common", "train", "fold", "export", "serve")
NOT_PLANTED = {"__init__.py", "config.py", "run.py"}  # commands' fields and texts: no expression that decides
TURNED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
SWAPPED = {
    "min": "max",
    "max": "min",
    "argmin": "argmax",
    "argmax": "argmin",
    "any": "all",
    "all": "any",
    "floor": "ceil",
}


@dataclass(frozen=True)
class Fault:
    """One changed stretch of a module's text."""

    module: str  # "fold/proof.py"
    line: int
    start: int  # of the text in bytes
    end: int
    text: str

    def planted_in(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def shown(self, source: bytes) -> str:
        was = source[self.start : self.end].decode()
        return f"{self.module}:{self.line}: {' '.join(was.split())}  →  {' '.join(self.text.split())}"


@dataclass(frozen=True)
class MutationConfig:
    modules: Annotated[tuple[str, ...], "files to plant in (default: all of common/ and the four stages)"] = ()
    num: Annotated[int, "faults; 0 for all"] = 40
    seed: Annotated[int, "which of them"] = 0
    timeout_s: Annotated[float, "longest run of the tests of one fault, which counts as found"] = 300.0


def command(config: MutationConfig) -> int:
    """Plant faults and print those that every test lets pass. Exit status 1 where there are any."""
    from common.progress import make_console, progress

    modules = [ROOT / name for name in config.modules] or sorted(
        path for stage in STAGES for path in (ROOT / stage).rglob("*.py") if path.name not in NOT_PLANTED
    )
    if missing := [str(path) for path in modules if not path.is_file()]:
        raise Refusal(f"there is no {missing[0]}: --modules takes files such as fold/proof.py")
    faults = list(dict.fromkeys(fault for path in modules for fault in faults_of(path)))
    random.Random(config.seed).shuffle(faults)
    faults = faults[: config.num or None]
    console, passed = make_console(), []
    with tempfile.TemporaryDirectory() as folder, progress(console, "faults", len(faults)) as advance:
        tree = copy_tree(Path(folder))
        for fault in faults:
            if not is_found(fault, tree, config.timeout_s):
                passed.append(fault)
                console.print(f"passed every test: {fault.shown((ROOT / fault.module).read_bytes())}", markup=False)
            advance(note=fault.module)
    console.print(f"{len(faults) - len(passed)} of {len(faults)} faults found")
    return int(bool(passed))


def faults_of(path: Path) -> Iterator[Fault]:
    """All faults of a module's functions, in the order of its text."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in function.body:
                for node in ast.walk(statement):
                    if text := _turned(node):
                        yield Fault(
                            str(path.relative_to(ROOT)),
                            node.lineno,  # type: ignore[attr-defined]
                            starts[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
                            starts[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
                            text,
                        )


def _turned(node: ast.AST) -> str | None:
    """The text of an expression or statement with one fault; None where there is nothing to turn round."""
    match node:
        case ast.Compare(left=left, ops=[op, *ops], comparators=comparators) if type(op) in TURNED:
            return f"({ast.unparse(ast.Compare(left, [TURNED[type(op)](), *ops], comparators))})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in TURNED and not _is_text(left, right):
            return f"({ast.unparse(ast.BinOp(left, TURNED[type(op)](), right))})"
        case ast.BoolOp(op=op, values=values) if type(op) in TURNED:
            return f"({ast.unparse(ast.BoolOp(TURNED[type(op)](), values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand) | ast.UnaryOp(op=ast.USub(), operand=operand):
            return f"({ast.unparse(operand)})"
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in SWAPPED:
            return ast.unparse(ast.Call(ast.Name(SWAPPED[name]), args, keywords))
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=args, keywords=keywords) if name in SWAPPED:
            return ast.unparse(ast.Call(ast.Attribute(value, SWAPPED[name]), args, keywords))
        case ast.Expr(value=ast.Call() | ast.Await()):
            return "pass"
    return None


def _is_text(*nodes: ast.expr) -> bool:
    return any(isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str) for node in nodes)


def copy_tree(folder: Path) -> Path:
    """The files that git does not ignore, copied to `folder`, so that no fault is ever in the tree itself."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # a deleted file is listed until the deletion is staged
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def tests_of(module: str) -> list[str]:
    """Test files that import a module, its mirror first; where none does, those of the modules that import it."""
    name = module.removesuffix(".py").replace("/", ".")
    last = name.rpartition(".")[2]
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _imports(path, name)]
    if not files:
        callers = [path for stage in STAGES for path in sorted((ROOT / stage).rglob("*.py")) if _imports(path, name)]
        names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in callers]
        tests = sorted((ROOT / "tests").rglob("test_*.py"))
        files = [path for path in tests if any(_imports(path, name) for name in names)]
    files.sort(key=lambda path: path.stem != f"test_{last}")
    return [str(path.relative_to(ROOT)) for path in files]


def _imports(path: Path, name: str) -> bool:
    """Whether a file imports a module, in any of the three ways that this project writes."""
    package, _, last = name.rpartition(".")
    wanted = rf"from {re.escape(name)} import|from {re.escape(package)} import .*\b{last}\b|import {re.escape(name)}\b"
    return re.search(wanted, path.read_text(encoding="utf-8")) is not None


def is_found(fault: Fault, tree: Path, timeout_s: float) -> bool:
    """Whether a test fails, or hangs, on a tree with the fault: all of the first file, the quick ones of the rest."""
    sound = (ROOT / fault.module).read_bytes()
    (tree / fault.module).write_bytes(fault.planted_in(sound))
    first, *rest = tests_of(fault.module) or [f"tests/{fault.module.partition('/')[0]}"]
    runs = [("-m", "not slow", first), ("-m", "slow", first)] + ([("-m", "not slow", *rest)] if rest else [])
    for run in runs:
        (tree / fault.module).write_bytes(fault.planted_in(sound))
        try:
            failed = _fails(run, tree, timeout_s)
        finally:
            (tree / fault.module).write_bytes(sound)
        if failed:
            _check_sound(run, tree, timeout_s)
            return True
    return False


@cache
def _check_sound(run: tuple[str, ...], tree: Path, timeout_s: float) -> None:
    """Refuses tests that fail without any fault: they would find every one."""
    if _fails(run, tree, timeout_s):
        raise Refusal(f"{run[-1]} fails without a fault: run it by itself first")


def _fails(arguments: tuple[str, ...], tree: Path, timeout_s: float) -> bool:
    argv = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(argv, cwd=tree, env=environment, timeout=timeout_s, capture_output=True)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode not in (0, 5)  # 5: nothing was collected


if __name__ == "__main__":
    sys.exit(run_command(command, MutationConfig, examples=EXAMPLES))
