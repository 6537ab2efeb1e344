"""A model that is to replace another is tried in a process of its own, which can be ended if it does not answer."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import given_arguments
from common.refusal import Refusal

if TYPE_CHECKING:
    from serve.config import ServeConfig

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import sys
sys.path[0] = sys.argv[1]
from serve.model.trial_process import run
sys.exit(run(sys.argv[2:]))
"""
_MARK = "error: "  # of `common.cli.run_command`


def prove(config: "ServeConfig") -> None:
    """Load, check and warm up the model of `config` elsewhere; refuses one that fails there, or takes too long."""
    paths = config.model_paths
    name = " and ".join(map(str, paths))
    options = given_arguments(replace(config, models=(), shadow=None, log_level="error"))
    argv = [sys.executable, "-c", _PROGRAM, str(_ROOT), str(os.getpid()), *map(str, paths), *shlex.split(options)]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=config.reload_seconds,
            process_group=0,  # Ctrl-C is for the server, which has requests to finish
        )
    except subprocess.TimeoutExpired:
        raise Refusal(
            f"{name} does not answer within {config.reload_seconds} s; give it longer with --reload-seconds"
        ) from None
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.startswith(_MARK)]
        raise Refusal(
            said[-1].removeprefix(_MARK)
            if said
            else f"{name} ends the process that tries it with status {done.returncode}; export it again"
        )
