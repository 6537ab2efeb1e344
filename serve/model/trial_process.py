"""The process in which serve/model/trial.py tries a model."""

import signal
from collections.abc import Sequence

from common.cli import run_command
from serve.config import ServeConfig
from serve.model.check import warm_up
from serve.processes.serving import end_with_parent, load
from serve.watching import logs


def run(argv: Sequence[str]) -> int:
    """Whether the model of serve/run.py's arguments loads and answers: its exit status, and why not on stderr.

    The first argument is the number of the process that asks.
    """
    parent, *rest = argv
    end_with_parent(signal.SIGKILL, int(parent))
    return run_command(_try, ServeConfig, argv=rest)


def _try(config: ServeConfig) -> None:
    logs.configure(config.log_level)
    for runtime in load(config):
        warm_up(runtime, config.max_batch)
