"""python bench/training.py: what the Dirac form costs a training step, in time and memory, by depth and by process."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import POSITIONAL, given_arguments, run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bench.forms import Workload
    from bench.rounds import Timing

Name = TypeVar("Name")
ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 128
PRECISIONS = ("bf16", "fp32")
FORMS = ("ordinary", "Dirac", "Dirac, reference")  # the first is what others are compared with
NETS = ((16, 1.0), (34, 2.0))  # depth and width; digits of Fashion-MNIST's size
DEPTHS = (10, 34, 100, 202, 400)  # at width 1/4, on 8x8 images
NUM_MEMORY_STEPS = 4
EXAMPLES = (
    "python bench/training.py                               # four minutes on two cores",
    "python bench/training.py --quick --out /tmp/figures",
    "python bench/training.py runs/model/checkpoint.pt      # adds how long that run took to 92, 94 and 95 %",
)


@dataclass(frozen=True)
class TrainingConfig:
    runs: Annotated[
        tuple[Path, ...], "checkpoints of finished Fashion-MNIST runs, for the time to an accuracy", POSITIONAL
    ] = ()
    rounds: Annotated[int, "rounds in which the forms alternate"] = 7
    round_s: Annotated[float, "seconds of one form in one round"] = 0.6
    quick: Annotated[bool, "one net, two rounds, no net of 400 layers: under a minute"] = False
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs/benchmarks")

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.round_s <= 0:
            raise Refusal("--rounds and --round-s must be positive")


def command(config: TrainingConfig) -> int:
    """Time training steps of Dirac and ordinary nets, their memory, nets of 10 to 400 layers, and two processes."""
    from bench.page import describe_machine, write_page
    from bench.training_page import page
    from common.progress import make_console
    from train.machine import keep_large_buffers

    runs, typed = [_read_run(path) for path in config.runs], _typed(config)
    if config.quick:
        config = replace(config, rounds=2, round_s=0.2)
    console = make_console()
    memory = _measure_memory(config, console)  # in processes of their own, before this one holds buffers
    processes = _measure_processes(config, console)
    keep_large_buffers()
    record = {
        "command": typed,
        "machine": describe_machine("torch"),
        "batch_size": BATCH_SIZE,
        "rounds": config.rounds,
        "steps": [_measure_net(net, config, console) for net in (NETS[:1] if config.quick else NETS)],
        "memory": memory,
        "depths": _measure_depths(config, console),
        "processes": processes,
        "runs": runs,
    }
    console.print(write_page(config.out, "training", page(record), record))
    return 0


def _typed(config: TrainingConfig) -> str:
    """The command as one would type it, without where its results go."""
    options = given_arguments(replace(config, runs=(), out=TrainingConfig.out))
    return " ".join(["python bench/training.py", *map(str, config.runs), options]).rstrip()


def _measure_net(net: tuple[int, float], config: TrainingConfig, console: Any) -> dict[str, Any]:
    """Steps of every form and precision in one alternation, and Ŵ with its gradients alone."""
    from bench.forms import Workload, make_step, make_weights
    from common.progress import progress

    workload = Workload(*net, 28, BATCH_SIZE)
    actions = {
        (precision, form): make_step(form, replace(workload, precision=precision))
        for precision in PRECISIONS
        for form in FORMS
    }
    actions |= {("weights", form): make_weights(form, workload) for form in FORMS[1:]}
    with progress(console, f"steps of {workload.depth}-{workload.width:g}", config.rounds) as advance:
        timings = _race(actions, num_rounds=config.rounds, round_s=config.round_s, advance=advance)
    rows = [
        {
            "precision": precision,
            "form": form,
            **timings[precision, form].to_dict(),
            "share_of_ordinary": timings[precision, form].speedup_over(timings[precision, "ordinary"]),
        }
        for precision in PRECISIONS
        for form in FORMS
    ]
    weights = [{"form": form, "round_ms": list(timings["weights", form].round_ms)} for form in FORMS[1:]]
    return {"net": _describe(workload), "rows": rows, "weights": weights}


def _describe(workload: "Workload") -> dict[str, Any]:
    from bench.forms import make_session
    from train.families import count_parameters

    net = make_session("Dirac", workload).net
    size = f"{workload.side}x{workload.side}"
    return {
        "name": f"{workload.depth}-{workload.width:g}",
        "images": size,
        "parameters": count_parameters(net),
    }


def _measure_memory(config: TrainingConfig, console: Any) -> list[dict[str, Any]]:
    """Each form in a process of its own: memory that one has given back would serve the next."""
    from dataclasses import asdict

    from bench.cost import cost_of
    from bench.forms import Workload, take
    from common.cores import num_cores
    from common.progress import progress

    rows, net = [], NETS[0]
    cases = [(precision, form) for precision in PRECISIONS for form in FORMS]
    cases = [case for case in cases if not config.quick or case[1] != FORMS[2]]
    with progress(console, "memory", len(cases)) as advance:
        for precision, form in cases:
            workload = Workload(*net, 28, BATCH_SIZE, precision)
            cost = cost_of(("torch", "bench.forms"), take, NUM_MEMORY_STEPS, form, workload, num_cores())
            rows.append({"precision": precision, "form": form, **asdict(cost), "own_bytes": cost.own_bytes})
            advance(note=f"{precision}, {form}")
    return rows


def _measure_depths(config: TrainingConfig, console: Any) -> list[dict[str, Any]]:
    from bench.forms import Workload, make_step
    from common.progress import progress

    depths = DEPTHS[:3] if config.quick else DEPTHS
    steps = {depth: make_step("Dirac", Workload(depth, 0.25, 8, BATCH_SIZE)) for depth in depths}
    with progress(console, "depths", config.rounds) as advance:
        timings = _race(steps, num_rounds=config.rounds, round_s=0.1, advance=advance)
    return [{"depth": depth, **timing.to_dict()} for depth, timing in timings.items()]


def _race(
    actions: "Mapping[Name, Callable[[], object]]",
    *,
    num_rounds: int,
    round_s: float,
    advance: "Callable[[int], None]",
) -> "dict[Name, Timing]":
    """The time of each action by its name; refuses where one fails, as nothing here may."""
    from functools import partial

    from bench.rounds import Failure, alternate, median_ms

    racers = {name: partial(median_ms, action, round_s, min_calls=1) for name, action in actions.items()}
    timings = {}
    for name, found in alternate(racers, batch_size=BATCH_SIZE, num_rounds=num_rounds, advance=advance).items():
        if isinstance(found, Failure):
            raise Refusal(f"{name}: {found.reason}")
        timings[name] = found
    return timings


def _measure_processes(config: TrainingConfig, console: Any) -> list[dict[str, Any]]:
    """One process with a thread for each core against two processes with gloo, in turns, each started afresh."""
    from bench.rounds import Timing
    from common.progress import progress

    num_runs, times = (1 if config.quick else 3), {1: [], 2: []}
    with progress(console, "processes", 2 * num_runs) as advance:
        for index in range(num_runs):
            for size in (1, 2) if index % 2 == 0 else (2, 1):
                times[size].append(_steps_in(size, num_steps=5 if config.quick else 30))
                advance(note=f"{size} processes")
    return [{"processes": size, **Timing(BATCH_SIZE, tuple(runs)).to_dict()} for size, runs in times.items()]


def _steps_in(num_processes: int, *, num_steps: int) -> float:
    """Milliseconds of a step, the cores shared out among the processes."""
    import json
    import os
    import subprocess

    from common.cores import num_cores

    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    argv = [sys.executable, *launcher, str(ROOT / "bench" / "step_in_world.py"), "--steps", str(num_steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, num_cores() // num_processes))}
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["step_ms"]


def _read_run(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; refuses another data set and a run that is not finished."""
    from train.checkpoint import load_checkpoint, load_net
    from train.families import count_parameters

    state = load_checkpoint(path)
    if state.config["dataset"] != "fashion-mnist" or state.test_accuracy is None:
        raise Refusal(f"{path} is no finished run on fashion-mnist; leave it out")
    elapsed, epochs = 0.0, []
    for row in state.history:
        elapsed += row["seconds"]
        kept = {key: row[key] for key in ("epoch", "train_accuracy", "validation_accuracy", "images_per_s")}
        epochs.append({**kept, "elapsed_s": elapsed})
    return {
        "name": state.spec.name,
        "command": state.config["command"],
        "parameters": count_parameters(load_net(state)),
        "test_accuracy": state.test_accuracy,
        "epochs": epochs,
    }


if __name__ == "__main__":
    sys.exit(run_command(command, TrainingConfig, examples=EXAMPLES))
