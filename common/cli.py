"""A frozen dataclass as a command line: each field is a default, a flag, a help text and a record of what was asked."""

import argparse
import dataclasses
import os
import shlex
import sys
import types
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from common.refusal import Refusal

Config = TypeVar("Config")
# As the third part of an Annotated: an argument without dashes that has a default all the same.
POSITIONAL = "positional"


def run_command(
    command: Callable[[Config], int | None],
    config_type: type[Config],
    *,
    examples: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv` into `config_type`, run `command` with it and return its exit status.

    A `Refusal` becomes one line on stderr and status 2; Ctrl-C becomes status 130.
    """
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":  # which a file's name would end
        sys.stdout.reconfigure(errors="replace")
    try:
        return command(parse(config_type, description=command.__doc__, examples=examples, argv=argv)) or 0
    except Refusal as refusal:
        print("error: " + " ".join(str(refusal).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {str(interrupt) or 'nothing was left half-written'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def parse(
    config_type: type[Config],
    *,
    description: str | None = None,
    examples: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> Config:
    """A `config_type` from `argv`. A field without a default, or marked POSITIONAL, has no dashes."""
    parser = _Parser(
        description=description,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = get_type_hints(config_type, include_extras=True)
    for field in _fields(config_type):
        _add_argument(parser, field, hints[field.name])
    values = vars(parser.parse_args(argv))
    return config_type(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def given_arguments(config: Any) -> str:
    """The arguments that turn the defaults into `config`, as a user would type them."""
    hints = get_type_hints(type(config), include_extras=True)
    placed, named = [], []
    for field in _fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        words = [] if value is True else list(map(str, value)) if isinstance(value, tuple) else [str(value)]
        if field.default is dataclasses.MISSING or POSITIONAL in get_args(hints[field.name]):
            placed += words
        else:
            named += ["--" + field.name.replace("_", "-"), *words]
    return shlex.join(placed + named)


def _fields(config: Any) -> list[dataclasses.Field[Any]]:
    """The fields in the order of the command line: those of a base class, which are keyword-only, come last."""
    return sorted(dataclasses.fields(config), key=lambda field: field.kw_only is True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(f"{message} (see {self.prog} --help)")


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    kind, text, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    names = [field.name] if required or POSITIONAL in marks else ["--" + field.name.replace("_", "-")]
    text = text.replace("%", "%%")
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        kind = next(member for member in get_args(kind) if member is not type(None))
    elif default not in (None, False, ()):
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    if kind is bool:
        parser.add_argument(*names, action="store_true", default=default, help=text)
        return
    options: dict[str, Any] = {"help": text} if required else {"help": text, "default": default}
    if POSITIONAL in marks:
        options["nargs"] = "?"
    if get_origin(kind) is tuple:
        members = get_args(kind)
        kind = members[0]
        options["nargs"] = "*" if members[-1] is Ellipsis else len(members)
    if get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
        kind = str
    options["type"] = kind
    if names[0].startswith("--") and "choices" not in options:
        options["metavar"] = {int: "N", float: "X", Path: "PATH"}.get(kind, "NAME")
    parser.add_argument(*names, **options)
