"""python bench/training.py: what the Dirac form costs a training step, in time and memory, by depth and by process."""

import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.page import Measurement, Record, describe_machine, publish, render
from common.cli import POSITIONAL, run_command
from common.progress import make_console, progress
from common.refusal import Refusal

BATCH_SIZE = 128
PRECISIONS = ("bf16", "fp32")
FORMS = ("ordinary", "Dirac", "Dirac, reference")  # the others are compared with the first
NETS = ((16, 1.0), (34, 2.0))  # depth and width; digits of Fashion-MNIST's size
DEPTHS = (10, 34, 100, 202, 400)  # at width 1/4, on 8x8 images
GOALS = (0.92, 0.94, 0.95)
EXAMPLES = (
    "python bench/training.py                               # four minutes on two cores",
    "python bench/training.py --quick --out /tmp/figures",
    "python bench/training.py runs/model/checkpoint.pt      # adds how long that run took to 92, 94 and 95 %",
)


@dataclass(frozen=True)
class TrainingConfig(Measurement):
    runs: Annotated[
        tuple[Path, ...], "checkpoints of finished Fashion-MNIST runs, for the time to an accuracy", POSITIONAL
    ] = ()
    rounds: Annotated[int, "rounds in which the forms alternate"] = 7
    round_s: Annotated[float, "seconds of one form in one round"] = 0.6
    quick: Annotated[bool, "one net, two rounds, no net of 400 layers: under a minute"] = False
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs/benchmarks")


def command(config: TrainingConfig) -> None:
    """Time training steps of Dirac and ordinary nets, their memory, nets of 10 to 400 layers, and two processes."""
    from bench import training_steps
    from train.machine import keep_large_buffers

    runs = [_read_run(path) for path in config.runs]
    rounds, round_s, num_starts, num_steps = (2, 0.2, 1, 5) if config.quick else (config.rounds, config.round_s, 3, 30)
    nets, depths, names = (NETS[:1], DEPTHS[:3], FORMS[:2]) if config.quick else (NETS, DEPTHS, FORMS)
    total = len(PRECISIONS) * len(names) + 2 * num_starts + (len(nets) + 1) * rounds
    measured = {"machine": describe_machine("torch"), "batch_size": BATCH_SIZE, "rounds": rounds, "runs": runs}
    with progress(make_console(), "measurements", total) as advance:
        # First the measurements in separate processes, before this one holds buffers.
        measured["memory"] = training_steps.measure_memory(NETS[0], names, advance)
        measured["processes"] = training_steps.time_processes(num_starts, num_steps, advance)
        keep_large_buffers()
        measured["steps"] = [training_steps.time_net(net, rounds, round_s, advance) for net in nets]
        measured["depths"] = training_steps.time_depths(depths, rounds, advance)
    publish(config, "training", page, **measured)


def _read_run(path: Path) -> dict[str, Any]:
    """The history of the run that wrote a checkpoint; refuses other data sets and unfinished runs."""
    from train.checkpoint import load_checkpoint, load_net
    from train.families import count_parameters

    state = load_checkpoint(path)
    if state.config["dataset"] != "fashion-mnist" or state.test_accuracy is None:
        raise Refusal(f"{path} is not a finished run on fashion-mnist; leave it out")
    kept = ("epoch", "train_accuracy", "validation_accuracy", "images_per_s")
    elapsed_s = accumulate(row["seconds"] for row in state.history)
    epochs = [{key: row[key] for key in kept} | {"elapsed_s": next(elapsed_s)} for row in state.history]
    about = {"name": state.spec.name, "command": state.config["command"], "test_accuracy": state.test_accuracy}
    return {**about, "parameters": count_parameters(load_net(state)), "epochs": epochs}


def page(record: Record) -> str:
    depths = [{**row, "per_layer": [ms / row["depth"] for ms in row["round_ms"]]} for row in record["depths"]]
    runs = render("training-runs", record, runs=list(map(_run, record["runs"]))) if record["runs"] else ""
    return render("training", record, steps=list(map(_steps, record["steps"])), depths=depths, runs=runs)


def _steps(net: Record) -> dict[str, Any]:
    rows = [{**row, "speed": [1000 * row["batch_size"] / ms for ms in row["round_ms"]]} for row in net["rows"]]
    weights_ms = median(net["weights"][0]["round_ms"])
    shares = {row["precision"]: weights_ms / row["median_ms"] for row in rows if row["form"] == "Dirac"}
    return {**net, "rows": rows, "shares": shares}


def _run(run: Record) -> dict[str, Any]:
    """A run with the first epoch that reached each goal."""
    epochs, goals = run["epochs"], []
    for goal in GOALS:
        reached = (row for row in epochs if (row["validation_accuracy"] or 0) >= goal)
        goals.append({"goal": goal, **next(reached, {"epoch": "never", "elapsed_s": ""})})
    return {**run, "goals": goals, "num_epochs": len(epochs), "seconds": epochs[-1]["elapsed_s"]}


if __name__ == "__main__":
    sys.exit(run_command(command, TrainingConfig, examples=EXAMPLES))
