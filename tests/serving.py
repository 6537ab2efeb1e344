"""Servers as processes: how tests start them, ask them, read their logs and wait for them."""

import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
PNG = {"Content-Type": "image/png"}
PATIENCE_S = 120.0  # for what takes seconds, on a machine that has much else to do


def until(holds):
    """What `holds()` gives as soon as that is true: for what no event tells. It fails after `PATIENCE_S`."""
    end = time.monotonic() + PATIENCE_S
    while not (found := holds()):
        assert time.monotonic() < end, f"it does not hold within {PATIENCE_S:g} s"
        time.sleep(0.001)  # or this loop would take the time of what it waits for
    return found


@contextmanager
def patience(server):
    """Whoever reads from `server` in this block waits no longer than `PATIENCE_S`: then it is killed."""
    timer = threading.Timer(PATIENCE_S, server.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def command(name, *argv):
    return [sys.executable, str(ROOT / "serve" / name), *map(str, argv)]


def popen(argv, **options):
    return subprocess.Popen(argv, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options})


def read_greeting(server):
    """Wait until it listens: the line that says what it serves, the one that says where, and its `url`."""
    lines = []
    with patience(server):
        for line in server.stdout:
            if found := re.match(r"serving at (http://127\.0\.0\.1:\d+)", line):
                server.greeting, server.where, server.url = lines[-1], line, found.group(1)
                return
            lines.append(line)
    error = server.stderr.read() if server.stderr else ""
    raise AssertionError(f"the server ended before it listened, after {lines}\n{error}")


def read_line(server):
    """The next line of its output."""
    with patience(server):
        return server.stdout.readline()


def ask(server, file, **options):
    return httpx.post(f"{server.url}/predict", content=file, headers=PNG, timeout=PATIENCE_S, **options)


def wait_for(server, message):
    """The next line of the log that holds `message`."""
    lines = []
    with patience(server):
        for line in server.stderr:
            if message in line:
                return line
            lines.append(line)
    raise AssertionError(f"the server ended without saying {message!r}, after {''.join(lines)}")


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
