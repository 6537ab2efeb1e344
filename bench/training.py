"""python bench/training.py: what the Dirac form costs a training step, in time and memory, by depth and by process."""

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.page import describe_machine, fill, machine_table, spread, table, typed_command, write_page
from bench.rounds import Timing, alternate_all, median_ms
from common.cli import POSITIONAL, run_command
from common.cores import num_cores
from common.progress import make_console, progress
from common.refusal import Refusal

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 128
PRECISIONS = ("bf16", "fp32")
FORMS = ("ordinary", "Dirac", "Dirac, reference")  # the first is what others are compared with
NETS = ((16, 1.0), (34, 2.0))  # depth and width; digits of Fashion-MNIST's size
DEPTHS = (10, 34, 100, 202, 400)  # at width 1/4, on 8x8 images
NUM_MEMORY_STEPS = 4
GOALS = (0.92, 0.94, 0.95)
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
    from train.machine import keep_large_buffers

    runs, typed = (
        [_read_run(path) for path in config.runs],
        typed_command("bench/training.py", config, positional="runs"),
    )
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


def _measure_net(net: tuple[int, float], config: TrainingConfig, console: Any) -> dict[str, Any]:
    """Steps of every form and precision in one alternation, and Ŵ with its gradients alone."""
    from bench.forms import Workload, make_session, make_step, make_weights
    from train.families import count_parameters

    workload = Workload(*net, 28, BATCH_SIZE)
    cases = [(precision, form) for precision in PRECISIONS for form in FORMS]
    actions = {(kind, form): make_step(form, replace(workload, precision=kind)) for kind, form in cases}
    actions |= {("weights", form): make_weights(form, workload) for form in FORMS[1:]}
    name = f"{workload.depth}-{workload.width:g}"
    with progress(console, f"steps of {name}", config.rounds) as advance:
        timings = _race(actions, config.rounds, config.round_s, advance)
    rows = [
        {
            "precision": precision,
            "form": form,
            **timings[precision, form].to_dict(),
            "share_of_ordinary": timings[precision, form].speedup_over(timings[precision, "ordinary"]),
        }
        for precision, form in cases
    ]
    weights = [{"form": form, "round_ms": list(timings["weights", form].round_ms)} for form in FORMS[1:]]
    size, parameters = f"{workload.side}x{workload.side}", count_parameters(make_session("Dirac", workload).net)
    return {"net": {"name": name, "images": size, "parameters": parameters}, "rows": rows, "weights": weights}


def _measure_memory(config: TrainingConfig, console: Any) -> list[dict[str, Any]]:
    """Each form in a process of its own, as the next one would reuse memory that one has freed."""
    from bench.forms import Workload, take
    from bench.lab.process import cost_of

    rows = []
    cases = [(precision, form) for precision in PRECISIONS for form in (FORMS[:2] if config.quick else FORMS)]
    with progress(console, "memory", len(cases)) as advance:
        for precision, form in cases:
            workload = Workload(*NETS[0], 28, BATCH_SIZE, precision)
            cost = cost_of(("torch", "bench.forms"), take, NUM_MEMORY_STEPS, form, workload, num_cores())
            rows.append({"precision": precision, "form": form, **asdict(cost), "own_bytes": cost.own_bytes})
            advance(note=f"{precision}, {form}")
    return rows


def _measure_depths(config: TrainingConfig, console: Any) -> list[dict[str, Any]]:
    from bench.forms import Workload, make_step

    depths = DEPTHS[:3] if config.quick else DEPTHS
    steps = {depth: make_step("Dirac", Workload(depth, 0.25, 8, BATCH_SIZE)) for depth in depths}
    with progress(console, "depths", config.rounds) as advance:
        timings = _race(steps, config.rounds, 0.1, advance)
    return [{"depth": depth, **timing.to_dict()} for depth, timing in timings.items()]


def _race(
    actions: dict[Any, Callable[[], object]], num_rounds: int, round_s: float, advance: Callable[..., None]
) -> dict[Any, Timing]:
    """The time of each action by its name; refuses where one fails."""
    racers = {name: partial(median_ms, action, round_s, min_calls=1) for name, action in actions.items()}
    return alternate_all(racers, batch_size=BATCH_SIZE, num_rounds=num_rounds, advance=advance)


def _measure_processes(config: TrainingConfig, console: Any) -> list[dict[str, Any]]:
    """One process with a thread for each core against two processes with gloo, in turns, each started afresh."""
    num_runs, times = (1 if config.quick else 3), {1: [], 2: []}
    with progress(console, "processes", 2 * num_runs) as advance:
        for index in range(num_runs):
            for size in (1, 2) if index % 2 == 0 else (2, 1):
                times[size].append(_shared_step_ms(size, num_steps=5 if config.quick else 30))
                advance(note=f"{size} processes")
    return [{"processes": size, **Timing(BATCH_SIZE, tuple(runs)).to_dict()} for size, runs in times.items()]


def _shared_step_ms(num_processes: int, *, num_steps: int) -> float:
    """Milliseconds of a step, the cores shared out among the processes."""
    import json
    import os
    import subprocess

    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    argv = [sys.executable, *launcher, str(ROOT / "bench" / "forms.py"), str(num_steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, num_cores() // num_processes))}
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["step_ms"]


def _read_run(path: Path) -> dict[str, Any]:
    """The history of the run that left a checkpoint; refuses another data set and a run that is not finished."""
    from train.checkpoint import load_checkpoint, load_net
    from train.families import count_parameters

    state = load_checkpoint(path)
    if state.config["dataset"] != "fashion-mnist" or state.test_accuracy is None:
        raise Refusal(f"{path} is not a finished run on fashion-mnist; leave it out")
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


def page(record: dict[str, Any]) -> str:
    """The page of one record."""
    memory = [
        [
            row["precision"],
            row["form"],
            *(f"{row[key] / 1e6:,.0f}" for key in ("imported_bytes", "own_bytes", "peak_bytes")),
        ]
        for row in record["memory"]
    ]
    depths = [
        [str(row["depth"]), spread(row["round_ms"]), spread([ms / row["depth"] for ms in row["round_ms"]], ".2f")]
        for row in record["depths"]
    ]
    processes = [
        [str(row["processes"]), spread(row["round_ms"]), f"{row['images_per_s']:,.0f}"] for row in record["processes"]
    ]
    fields = {
        "machine": machine_table(record["machine"]),
        "steps": "".join(map(_steps, record["steps"])),
        "memory": table(["precision", "form", "imports, MB", "steps, MB", "together, MB"], memory),
        "depths": table(["layers", "step, ms", "ms per layer"], depths),
        "processes": table(["processes", "step, ms", "images/s"], processes),
        "runs": fill("training-runs", runs="".join(map(_run, record["runs"]))) if record["runs"] else "",
    }
    return fill("training", **{**record, **fields})


def _steps(net: dict[str, Any]) -> str:
    about, (ours, reference) = net["net"], (row["round_ms"] for row in net["weights"])
    rows = [
        [
            row["precision"],
            row["form"],
            spread([1000 * row["batch_size"] / ms for ms in row["round_ms"]], ",.0f"),
            f"{row['median_ms']:.1f}",
            f"{100 * row['share_of_ordinary']:.1f} %",
        ]
        for row in net["rows"]
    ]
    shares = [
        f"{100 * statistics.median(ours) / row['median_ms']:.1f} % of a step in {row['precision']}"
        for row in net["rows"]
        if row["form"] == "Dirac"
    ]
    return f"""### {about["name"]}, {about["images"]} images, {about["parameters"]:,} parameters

{table(["precision", "form", "images/s", "step, ms", "speed of ordinary"], rows)}

All filters Ŵ and the gradients of a, b and W alone: {spread(ours)} ms, which is {" and ".join(shares)}; as the \
reference builds them {spread(reference)} ms.

"""


def _run(run: dict[str, Any]) -> str:
    epochs, rows = run["epochs"], []
    for goal in GOALS:
        first = next((row for row in epochs if (row["validation_accuracy"] or 0) >= goal), None)
        reached = [str(first["epoch"]), f"{first['elapsed_s']:,.0f} s"] if first else ["never", ""]
        rows.append([f"{100 * goal:.0f} %", *reached])
    return f"""
`{run["command"]}` ({run["name"]}, {run["parameters"]:,} parameters): test accuracy \
{100 * run["test_accuracy"]:.2f} % after {len(epochs)} epochs and {epochs[-1]["elapsed_s"]:,.0f} s, at \
{spread([row["images_per_s"] for row in epochs], ".0f")} images/s.

{table(["held-out accuracy", "first after epoch", "time"], rows)}
"""


if __name__ == "__main__":
    sys.exit(run_command(command, TrainingConfig, examples=EXAMPLES))
