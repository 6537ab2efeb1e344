"""The README's commands, run as they stand there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from serving import read_greeting

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.partition("  #")[0].rstrip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def argv_of(line, port):
    """A line of the README as a process: this Python, this tree, a free port."""
    words = [word.replace("localhost:8000", f"localhost:{port}") for word in shlex.split(line.removesuffix("&"))]
    if words[0] != "python":
        return words
    extra = ["--port", str(port)] if words[1] == "serve/run.py" else []
    return [sys.executable, str(ROOT / words[1]), *words[2:], *extra]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_road_one_step_at_a_time_works_as_written(tmp_path, port):
    servers = []
    try:
        for line in LINES:
            if line.split()[0] not in ("python", "curl"):
                continue
            if line.endswith("&"):
                servers.append(subprocess.Popen(argv_of(line, port), cwd=tmp_path, stdout=subprocess.PIPE, text=True))
                read_greeting(servers[-1])
                continue
            done = subprocess.run(argv_of(line, port), cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            if line.startswith("curl"):
                assert '"label"' in done.stdout, f"{line}\n{done.stdout}{done.stderr}"
    finally:
        for server in servers:
            server.terminate()
            server.communicate(timeout=60)
    assert len(servers) == 1


def test_every_target_that_the_readme_names_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", "\n".join(LINES), flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
    assert LINES[0] == "make demo"
