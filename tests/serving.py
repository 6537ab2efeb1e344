"""Servers as processes: how tests start them, ask them and read their logs."""

import re
import subprocess
import sys
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
PNG = {"Content-Type": "image/png"}


def command(name, *argv):
    return [sys.executable, str(ROOT / "serve" / name), *map(str, argv)]


def popen(argv, **options):
    return subprocess.Popen(argv, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options})


def read_greeting(server):
    """Wait until it listens: the line that says what it serves, the one that says where, and its `url`."""
    lines = []
    for line in server.stdout:
        if found := re.match(r"serving at (http://127\.0\.0\.1:\d+)", line):
            server.greeting, server.where, server.url = lines[-1], line, found.group(1)
            return
        lines.append(line)
    raise AssertionError(f"the server ended before it listened, after {lines}")


def ask(server, file, **options):
    return httpx.post(f"{server.url}/predict", content=file, headers=PNG, timeout=60, **options)


def wait_for(server, message):
    """The next line of the log that holds `message`."""
    for line in server.stderr:
        if message in line:
            return line
    raise AssertionError(f"the server ended without saying {message!r}")


def workers_of(server):
    """The processes that serve, of Linux."""
    return children_of(server.pid, "spawn_main")


def children_of(process, word):
    """Those that any of its threads has started, with `word` in their command, of Linux."""
    threads = Path(f"/proc/{process}/task").iterdir()
    children = [int(pid) for thread in threads for pid in read_of_proc(thread / "children").split()]
    return [pid for pid in children if word in read_of_proc(f"/proc/{pid}/cmdline")]


def read_of_proc(path):
    """A file of a thread or process that may end at any time: empty once it has."""
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
