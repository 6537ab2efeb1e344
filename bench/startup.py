"""python bench/startup.py: from starting the server to its first answer, where the time goes, and its memory."""

import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.page import Measurement, describe_machine, publish, render
from bench.lab.process import in_fresh_process
from bench.lab.rounds import turns
from bench.lab.server import IMAGE, MODEL, ROOT, start
from common.cli import POSITIONAL, run_command
from common.progress import make_console, progress
from common.refusal import Refusal

NUM_REQUESTS = 100
EXAMPLES = (
    "python bench/startup.py                                # a minute",
    "python bench/startup.py plain.onnx --rounds 15",
    "python bench/startup.py --quick --out /tmp/figures",
)


@dataclass(frozen=True)
class StartupConfig(Measurement):
    models: Annotated[
        tuple[Path, ...], "what to serve (default: a small net of random weights, and the bundled model)", POSITIONAL
    ] = ()
    rounds: Annotated[int, "starts of each model"] = 11
    quick: Annotated[bool, "three starts"] = False
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs/benchmarks")


def command(config: StartupConfig) -> None:
    """Start the server repeatedly, wait until /readyz answers 200, send 100 requests, and read its memory."""
    rounds = 3 if config.quick else config.rounds
    with tempfile.TemporaryDirectory() as folder:
        paths = config.models or (in_fresh_process(_write_tiny_net, Path(folder)), MODEL)
        models: dict[Path, dict[str, Any]] = {
            path: {"name": path.name, "file_bytes": path.stat().st_size, "starts": [], "phases": []} for path in paths
        }
        with progress(make_console(), "starts", (rounds + 1) * len(models)) as advance:
            for index, turn in turns(paths, rounds, warm_up=True):  # which fills the page cache
                for path in turn:
                    measured, phases = _start(path), in_fresh_process(_phases, path)
                    if index >= 0:
                        models[path]["starts"].append(measured)
                        models[path]["phases"].append(phases)
                    advance(note=path.name)
    machine = describe_machine("onnxruntime-gpu", "onnxruntime", "fastapi", "pydantic", "uvicorn", "numpy")
    record = {"machine": machine, "rounds": rounds, "models": list(models.values()), "imports_ms": _imports(rounds)}
    publish(config, "startup", page, **record)


def page(record: Mapping[str, Any]) -> str:
    imports = {name: times[0] for name, times in record["imports_ms"].items()}
    slowest = sorted(imports.items(), key=lambda item: -item[1])
    slow = [{"name": name, "ms": ms} for name, ms in slowest if ms >= 2]
    return render("startup", record, num_requests=NUM_REQUESTS, total_ms=sum(imports.values()), imports=slow)


def _start(model: Path) -> dict[str, Any]:
    """One server from its first instruction to its last request."""
    begin, image = time.perf_counter(), IMAGE.read_bytes()
    with start(model, "--runtime", "auto", "--log-level", "error") as server:
        ready_s = time.perf_counter() - begin
        statuses = [server.predict(image)]
        answer_s = time.perf_counter() - begin
        statuses += [server.predict(image) for _ in range(NUM_REQUESTS - 1)]
        has_torch = "libtorch" in Path(f"/proc/{server.pid}/maps").read_text()
        resident = server.rss_bytes(with_children=True)
    if set(statuses) != {200}:
        raise Refusal(f"POST /predict answered {sorted(set(statuses))}")
    return {"ready_s": ready_s, "answer_s": answer_s, "resident_bytes": resident, "has_torch": has_torch}


def _phases(model: Path) -> dict[str, float]:
    """Seconds of each step of a start, one after another in this process."""
    marks = {"": time.perf_counter()}
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    marks["Python"] = time.perf_counter()
    import export.runtimes.onnx_session  # noqa: F401

    marks["import runtime"] = time.perf_counter()
    from serve.config import ServeConfig
    from serve.model.check import warm_up
    from serve.processes import serving
    from serve.watching import logs

    marks["import server"] = time.perf_counter()
    config = ServeConfig((model,))
    stream = logs.configure(config.log_level)
    runtimes = serving.load(config)
    marks["load and check"] = time.perf_counter()
    serving.whole_app(config, runtimes, stream, load=lambda: runtimes)
    marks["make app"] = time.perf_counter()
    warm_up(runtimes, config.max_batch)
    marks["warm up"] = time.perf_counter()
    return {name: marks[name] - marks[before] for before, name in itertools.pairwise(marks)}


def _imports(rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each package's own modules, sorted over the runs."""
    program = "import export.runtimes.onnx_session, serve.processes.serving"
    argv = [sys.executable, "-X", "importtime", "-c", program]
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        packages: dict[str, float] = defaultdict(float)
        report = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stderr
        for microseconds, module in re.findall(r"import time: +(\d+) \|[^|]*\| *(\w+)", report):
            packages[_package(module)] += int(microseconds) / 1000
        for name, milliseconds in packages.items():
            found[name].append(milliseconds)
    return {name: sorted(times) for name, times in found.items()}


def _package(module: str) -> str:
    if module in ("common", "train", "fold", "export", "serve"):
        return "this project"
    return "standard library" if module in sys.stdlib_module_names else module


def _write_tiny_net(folder: Path) -> Path:
    from bench.servers.race import write_net  # which imports torch

    return write_net("tiny", (), folder).path


if __name__ == "__main__":
    sys.exit(run_command(command, StartupConfig, examples=EXAMPLES))
