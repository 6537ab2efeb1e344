"""The process in which serve/trial.py tries a model."""

import signal
from collections.abc import Sequence

from serve import logs
from serve.process import end_with_parent, load
from serve.reload import warm_up
from serve.run import ServeConfig
from train.cli import run_command


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
