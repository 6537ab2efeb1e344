import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from common.cli import POSITIONAL, given_arguments, parse, run_command
from common.refusal import Refusal

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for stage in ("common", "train", "fold", "export", "serve")
    for path in (ROOT / stage).glob("*.py")
    if "__main__" in path.read_text()
)


@dataclass(frozen=True)
class Config:
    source: Annotated[Path, "what to read"]
    rate: Annotated[float, "100 % of it"] = 0.5
    kind: Annotated[Literal["a", "b"], "which"] = "a"
    batch: Annotated[tuple[int, int, int], "least, usual, most"] = (1, 8, 64)
    rest: Annotated[tuple[Path, ...], "more"] = ()
    limit: Annotated[int | None, "no limit by default"] = None
    loud: Annotated[bool, "say more"] = False


def test_a_dataclass_is_the_command_line():
    assert parse(Config, argv=["x"]) == Config(Path("x"))
    argv = "x --rate 2 --kind b --batch 1 2 3 --rest p q --limit 5 --loud".split()
    assert parse(Config, argv=argv) == Config(Path("x"), 2.0, "b", (1, 2, 3), (Path("p"), Path("q")), 5, True)


def test_a_name_that_is_not_utf_8_ends_no_command_in_any_locale():
    script = (
        "import sys; from common.cli import run_command; from tests.common.test_cli import Config; "
        "sys.exit(run_command(lambda config: print(config.source), Config))"
    )
    call = [sys.executable, "-c", script, b"caf\xe9"]
    env = {"PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, capture_output=True, cwd=ROOT, env=env, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf?\n", b"")


def test_help_says_what_kind_of_value_a_flag_takes(capsys):
    with pytest.raises(SystemExit):
        parse(Config, argv=["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for flag in ("--rate X", "--kind {a,b}", "--batch N N N", "--rest [PATH ...]", "--limit N"):
        assert f"{flag} " in shown


def test_the_arguments_that_were_given_make_the_same_config_again():
    for line in ("x", "'a b' --rate 2.0 --kind b --batch 1 2 3 --rest p q --limit 5 --loud"):
        config = parse(Config, argv=shlex.split(line))
        assert given_arguments(config) == line


def test_a_positional_argument_with_a_default_is_written_without_dashes():
    @dataclass(frozen=True)
    class Optional:
        rounds: Annotated[int, "how many"] = 3
        model: Annotated[Path, "what to serve", POSITIONAL] = Path("plain.onnx")

    for line in ("", "other.onnx --rounds 2"):
        assert given_arguments(parse(Optional, argv=shlex.split(line))) == line


def test_flags_that_commands_share_come_behind_their_own(capsys):
    @dataclass(frozen=True, kw_only=True)
    class Shared:
        mean: Annotated[tuple[float, ...], "of all"] = ()

    @dataclass(frozen=True)
    class Own(Shared):
        source: Annotated[Path, "what to read"]
        loud: Annotated[bool, "say more"] = False

    config = parse(Own, argv=["x", "--mean", "0.5", "1", "--loud"])
    assert config == Own(Path("x"), True, mean=(0.5, 1.0))
    assert given_arguments(config) == "x --loud --mean 0.5 1.0"
    with pytest.raises(SystemExit):
        parse(Own, argv=["--help"])
    text = capsys.readouterr().out
    assert text.rindex("--loud") < text.rindex("--mean")


def test_an_argument_without_dashes_may_have_a_default():
    @dataclass(frozen=True)
    class Optional:
        source: Annotated[Path | None, "what to read", POSITIONAL] = None
        loud: Annotated[bool, "say more"] = False

    assert parse(Optional, argv=["--loud"]) == Optional(None, True)
    assert parse(Optional, argv=["x"]) == Optional(Path("x"))


@pytest.mark.parametrize(
    "argv", [[], ["x", "--rate", "fast"], ["x", "--kind", "c"], ["x", "--batch", "1"], ["x", "--ra", "1"]]
)
def test_a_wrong_command_line_is_refused_in_one_line(argv, capsys):
    assert run_command(lambda config: 0, Config, argv=argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_refusal_and_interrupt_become_one_line_and_a_status(capsys):
    def refuse(config):
        raise Refusal("no\nroom")

    def interrupt(config):
        raise KeyboardInterrupt

    assert run_command(refuse, Config, argv=["x"]) == 2
    assert capsys.readouterr().err == "error: no room\n"
    assert run_command(interrupt, Config, argv=["x"]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was left half-written\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_from_any_folder_without_torch(command, tmp_path):
    code = "import runpy, sys; sys.argv[1:] = ['--help']\n"
    code += f"sys.path[0] = {str((ROOT / command).parent)!r}\n"
    code += f"try: runpy.run_path({str(ROOT / command)!r}, run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code\n"
    code += "assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "examples:" in result.stdout
