"""python bench/startup.py: from starting the server to its first answer, where the time goes, and its memory."""

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.process import in_fresh_process
from bench.lab.server import Server, free_port
from bench.page import describe_machine, fill, machine_table, spread, table, write_page
from common.cli import POSITIONAL, given_arguments, run_command
from common.refusal import Refusal

ROOT = Path(__file__).resolve().parents[1]
SERVER = ROOT / "serve" / "run.py"
BUNDLED = ROOT / "models" / "fashion-mnist.onnx"
IMAGE = ROOT / "models" / "held-out" / "Sneaker_9.png"
NUM_REQUESTS = 100
EXAMPLES = (
    "python bench/startup.py                                # a minute",
    "python bench/startup.py plain.onnx --rounds 15",
    "python bench/startup.py --quick --out /tmp/figures",
)


@dataclass(frozen=True)
class StartupConfig:
    models: Annotated[
        tuple[Path, ...], "what to serve (default: a small net of random weights, and the bundled model)", POSITIONAL
    ] = ()
    rounds: Annotated[int, "starts of each model"] = 11
    quick: Annotated[bool, "three starts"] = False
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs/benchmarks")

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise Refusal(f"--rounds must be at least 1, got {self.rounds}")


def command(config: StartupConfig) -> int:
    """Start the server again and again, wait until /readyz answers 200, send 100 requests, and read its memory."""
    from common.progress import make_console, progress

    console, rounds = make_console(), 3 if config.quick else config.rounds
    starts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    phases: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        models = config.models or (in_fresh_process(_small_model, Path(folder)), BUNDLED)
        with progress(console, "starts", (rounds + 1) * len(models)) as advance:
            for index in range(-1, rounds):  # the first fills the page cache
                for model in models[:: 1 if index % 2 == 0 else -1]:
                    start, parts = _start(model), in_fresh_process(_phases, model)
                    if index >= 0:
                        starts[model.name].append(start)
                        phases[model.name].append(parts)
                    advance(note=model.name)
        sizes = {model.name: model.stat().st_size for model in models}
    record = {
        "command": f"python bench/startup.py {given_arguments(replace(config, out=StartupConfig.out))}".rstrip(),
        "machine": describe_machine("onnxruntime-gpu", "onnxruntime", "fastapi", "pydantic", "uvicorn", "numpy"),
        "rounds": rounds,
        "models": [
            {"name": name, "file_bytes": sizes[name], "starts": runs, "phases": phases[name]}
            for name, runs in starts.items()
        ],
        "imports_ms": _imports(rounds),
    }
    console.print(write_page(config.out, "startup", markdown(record), record))
    return 0


def markdown(record: dict[str, Any]) -> str:
    """The page of one record."""
    starts, phases = [], []
    for model in record["models"]:
        ready_s, answer_s, resident = (
            [start[key] for start in model["starts"]] for key in ("ready_s", "answer_s", "resident_bytes")
        )
        memory = spread([value / 1e6 for value in resident], ".0f")
        loads = "yes" if any(start["has_torch"] for start in model["starts"]) else "no"
        size = f"{model['file_bytes'] / 1e6:.2f}"
        starts.append([model["name"], size, spread(ready_s, ".2f"), spread(answer_s, ".2f"), memory, loads])
        steps = ([1000 * run[name] for run in model["phases"]] for name in model["phases"][0])
        phases.append([model["name"], *(spread(times, ".0f") for times in steps)])
    imports = sorted(record["imports_ms"].items(), key=lambda item: -item[1][0])
    return fill(
        "startup",
        **{name: record[name] for name in ("command", "rounds")},
        machine=machine_table(record["machine"]),
        starts=table(["model", "MB", "s until ready", "s until /predict", "MB resident", "torch loaded"], starts),
        num_requests=NUM_REQUESTS,
        phases=table(["model", *record["models"][0]["phases"][0]], phases),
        total_ms=sum(times[0] for _, times in imports),
        imports=table(["package", "ms"], [[name, f"{times[0]:.0f}"] for name, times in imports if times[0] >= 2]),
    )


def _start(model: Path) -> dict[str, Any]:
    """One server from its first instruction to its last request."""
    begin, port, image = time.perf_counter(), free_port(), IMAGE.read_bytes()
    command = [sys.executable, str(SERVER), str(model), "--port", str(port), "--log-level", "error"]
    with Server(command, port) as server:
        ready_s = time.perf_counter() - begin
        statuses = [server.predict(image)]
        answer_s = time.perf_counter() - begin
        statuses += [server.predict(image) for _ in range(NUM_REQUESTS - 1)]
        has_torch = "libtorch" in Path(f"/proc/{server.pid}/maps").read_text()
        resident = server.family_bytes()
    if set(statuses) != {200}:
        raise Refusal(f"POST /predict answered {sorted(set(statuses))}")
    return {"ready_s": ready_s, "answer_s": answer_s, "resident_bytes": resident, "has_torch": has_torch}


def _phases(model: Path) -> dict[str, float]:
    """Seconds of each step of a start, one after another in this process."""
    marks = [time.perf_counter()]
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    marks.append(time.perf_counter())
    import export.runtimes.onnx_session  # noqa: F401

    marks.append(time.perf_counter())
    from serve.config import ServeConfig
    from serve.processes import serving
    from serve.watching import logs

    marks.append(time.perf_counter())
    config = ServeConfig((model,))
    stream = logs.configure(config.log_level)
    runtimes = serving.load(config)
    marks.append(time.perf_counter())
    serving.whole_app(config, runtimes, stream, load=lambda: runtimes)
    marks.append(time.perf_counter())
    from serve.model.check import warm_up

    warm_up(runtimes[0], config.max_batch)
    marks.append(time.perf_counter())
    names = ("Python", "import runtime", "import server", "load and check", "make app", "warm up")
    return {name: end - start for name, start, end in zip(names, marks, marks[1:], strict=False)}


def _imports(rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each package's own modules, sorted over the runs."""
    program = "import export.runtimes.onnx_session, serve.processes.serving"
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        argv = [sys.executable, "-X", "importtime", "-c", program]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
        packages: dict[str, float] = defaultdict(float)
        for line in done.stderr.splitlines():
            microseconds, _, name = line.removeprefix("import time:").split("|")
            if microseconds.strip().isdigit():
                packages[_package(name.strip())] += int(microseconds) / 1000
        for name, milliseconds in packages.items():
            found[name].append(milliseconds)
    return {name: sorted(times) for name, times in found.items()}


def _package(module: str) -> str:
    top = module.partition(".")[0]
    if top in ("common", "train", "fold", "export", "serve"):
        return "this project"
    return "standard library" if top in sys.stdlib_module_names else top


def _small_model(folder: Path) -> Path:
    """DiracNet-10-0.25 for digits, random weights, as export/to_onnx.py writes it."""
    import torch

    from common.files import write_whole
    from common.spec import Spec
    from export.graphs.graph import to_onnx
    from fold.lower import lower
    from fold.plain import fold_net
    from train.data import datasets
    from train.families import build

    info = datasets.info_of("digits")
    spec = Spec("cifar", 10, 0.25, "ncrelu", info.image, info.labels)
    torch.manual_seed(0)
    model = to_onnx(lower(fold_net(build(spec).eval()).float(), "shared"), spec, {})
    return write_whole(folder / "small.onnx", model.SerializeToString())


if __name__ == "__main__":
    sys.exit(run_command(command, StartupConfig, examples=EXAMPLES))
