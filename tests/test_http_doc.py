"""docs/http.md: its examples, run as they stand there against real servers, and its tables."""

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
from serving import read_greeting
from starlette.routing import Route, compile_path

from bench.lab.server import free_port
from common.image import MAX_PIXELS
from export.runtimes.load import load_runtime
from serve.config import BUNDLED, ServeConfig
from serve.request import problems
from serve.request.access import Access
from serve.request.app import make_app
from serve.request.limits import Limits

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "http.md").read_text()
# A block of commands, and the answer that stands behind it, or "".
BLOCKS = re.findall(r"```sh\n(.*?)```(?:\n\n```json\n(.*?)```)?", PAGE, flags=re.DOTALL)
# This Python, wherever PATH leads; a server takes its shell's place, so that ending it ends the server.
PYTHON, SERVER = 'python() { "$PYTHON" "$@"; }\n', 'python() { exec "$PYTHON" "$@"; }\n'
FAIL = 'curl() { command curl --fail "$@"; }\n'  # where the page shows no answer, the answer is no problem


@pytest.fixture
def addresses():
    """(method, path) of all that a server with a key answers."""
    runtime = load_runtime(BUNDLED)
    app = make_app(runtime, Limits(), access=Access(api_key=b"key"), load=lambda: (runtime,))
    shown = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    hidden = {(method, route.path) for route in app.routes if isinstance(route, Route) for method in route.methods}
    return shown | hidden


def shape_of(answer):
    """The members and types of a JSON value, and of the first element of each list."""
    match answer:
        case dict():
            return {name: shape_of(value) for name, value in answer.items()}
        case list():
            return [shape_of(value) for value in answer[:1]]
        case _:
            return type(answer)


@contextmanager
def started(line, cwd, environment):
    """A server of the page, from its line, once it serves."""
    server = subprocess.Popen(
        ["bash", "-c", SERVER + line.removesuffix("&")],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        read_greeting(server)
        yield
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.slow
def test_examples_answer_as_written(tmp_path):
    ports = {"8000": str(free_port()), "8001": str(free_port())}
    for name in ("serve", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("DIRACNET_API_KEY", None)
    scripts = [(re.sub(r"\b800[01]\b", lambda port: ports[port.group()], block), answer) for block, answer in BLOCKS]
    servers = [script.rstrip() for script, _ in scripts if script.endswith("&\n")]
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(started(server, tmp_path, environment))
        for script, expected in scripts:
            if script.rstrip() in servers:
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", PYTHON + ("" if expected else FAIL) + script],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
            if expected:
                assert shape_of(json.loads(done.stdout)) == shape_of(json.loads(expected)), script


def test_every_address_is_listed_and_asked(addresses):
    assert set(re.findall(r"^\| `(GET|POST) (\S+)` \|", PAGE, flags=re.MULTILINE)) == addresses
    commands = "\n".join(block.replace("\\\n", " ") for block, _ in BLOCKS).splitlines()
    asked = {
        ("POST" if re.search(r" --data-binary| -F | -X POST", line) else "GET", url)
        for line in commands
        for url in re.findall(r"localhost:\d+(/[^\s'?]*)", line)
        if line.startswith("curl")
    }
    assert not [
        (method, path)
        for method, path in addresses
        if not any(method == asked_by and compile_path(path)[0].match(url) for asked_by, url in asked)
    ]


def test_the_table_of_problems_is_that_of_the_server():
    kinds = [kind for kind in vars(problems).values() if isinstance(kind, problems.Kind)]
    written = re.findall(r"^\| `([a-z][a-z-]+)` \| (\d+) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert written == [(kind.name, str(kind.status), kind.title) for kind in kinds]


def test_limits_are_the_defaults_of_the_command():
    defaults = {f"--{field.name.replace('_', '-')}": str(field.default) for field in fields(ServeConfig)}
    written = re.findall(r"^\| `(--[a-z-]+)` \| (\S+) \|", PAGE, flags=re.MULTILINE)
    assert len(written) == 7
    assert dict(written).items() <= defaults.items()
    assert f"more than {MAX_PIXELS:,} pixels" in PAGE
