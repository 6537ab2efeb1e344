"""Virtual environments of the servers that ours is compared with: each has its own pinned packages."""

import subprocess
import sys
from pathlib import Path

from common.files import read_whole, write_whole
from common.refusal import Refusal

PEERS = Path(__file__).parent / "peers"


def make_environment(name: str, folder: Path) -> Path:
    """The Python of an environment with the packages of peers/NAME.txt, made below `folder` unless it is there.

    Refuses, with the last line of pip, what cannot be installed here.
    """
    requirements = PEERS / f"{name}.txt"
    environment = (folder / name).absolute()
    python, installed = environment / "bin" / "python", environment / "requirements.txt"
    wanted = read_whole(requirements)
    if installed.exists() and installed.read_bytes() == wanted:
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(environment)], name)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "-r", str(requirements)], name)
    write_whole(installed, wanted)  # last: what was cut off before is made anew
    return python


def _run(argv: list[str], name: str) -> None:
    done = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Refusal(f"{name} cannot be installed: {last[:300]}")
