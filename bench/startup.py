"""python bench/startup.py: from starting the server to its first answer, where the time goes, and its memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import POSITIONAL, given_arguments, run_command
from common.refusal import Refusal

ROOT = Path(__file__).resolve().parents[1]
SERVER = ROOT / "serve" / "run.py"
BUNDLED = ROOT / "models" / "fashion-mnist.onnx"
IMAGE = ROOT / "models" / "held-out" / "Sneaker_9.png"
NUM_REQUESTS = 100
POLL_S = 0.002
LONGEST_S = 30.0
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
    """Start the server again and again, wait until /readyz answers 200, ask 100 times, and read its memory."""
    import tempfile

    from bench.cost import in_fresh_process
    from bench.page import describe_machine, write_page
    from common.progress import make_console, progress

    console, rounds = make_console(), 3 if config.quick else config.rounds
    starts: dict[str, list[dict[str, Any]]] = {}
    phases: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = config.models or (in_fresh_process(_small_model, Path(folder)), BUNDLED)
        with progress(console, "starts", (rounds + 1) * len(models)) as advance:
            for index in range(-1, rounds):  # the first fills the page cache
                for model in models[:: 1 if index % 2 == 0 else -1]:
                    start, parts = _start(model), in_fresh_process(_phases, model)
                    if index >= 0:
                        starts.setdefault(model.name, []).append(start)
                        phases.setdefault(model.name, []).append(parts)
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
    console.print(write_page(config.out, "startup", page(record), record))
    return 0


def page(record: dict[str, Any]) -> str:
    """The page of one record."""
    from bench.page import machine_table, spread, table

    rows, phases = [], []
    for model in record["models"]:
        starts = model["starts"]
        columns = [[start[key] for start in starts] for key in ("ready_s", "answer_s", "resident_bytes")]
        memory = [value / 1e6 for value in columns.pop()]
        loads = "yes" if any(start["has_torch"] for start in starts) else "no"
        size = f"{model['file_bytes'] / 1e6:.2f}"
        rows.append([model["name"], size, *(spread(column, ".2f") for column in columns), spread(memory, ".0f"), loads])
        steps = {name: [1000 * run[name] for run in model["phases"]] for name in model["phases"][0]}
        phases.append([model["name"], *(spread(times, ".0f") for times in steps.values())])
    imports = sorted(record["imports_ms"].items(), key=lambda item: -item[1][0])
    total = sum(times[0] for _, times in imports)
    lines = [[name, f"{times[0]:.0f}"] for name, times in imports if times[0] >= 2]
    parts = [
        "# Starting the server",
        f"Written by `{record['command']}`. `python serve/run.py MODEL --port N` is started {record['rounds']} times "
        "for each model, in turns; the page cache is warm. A client asks every 2 ms until the server takes its "
        "connection and `/readyz` answers 200. Figures are medians, and in brackets the smallest and the largest.",
        machine_table(record["machine"]),
        table(["model", "MB", "s until ready", "s until /predict", "MB resident", "torch loaded"], rows),
        f"The first `/predict` is asked once the server is ready; memory is resident after {NUM_REQUESTS} of them, "
        "in the server and in the processes of its model.",
        "## Where the time goes",
        "Milliseconds of each step, one after another in a fresh process:",
        table(["model", *record["models"][0]["phases"][0]], phases),
        f"Milliseconds of imports by package, each without what it imports in turn (`python -X importtime`, fastest of "
        f"{record['rounds']}, packages of 2 ms and more; {total:.0f} in all, measuring included):",
        table(["package", "ms"], lines),
    ]
    return "\n\n".join(parts) + "\n"


def _start(model: Path) -> dict[str, Any]:
    """One server from its first instruction to its last request."""
    import time

    from bench.cost import family_bytes

    begin = time.perf_counter()
    with _server(model) as (process, port):
        _ask(port, "GET", "/readyz", begin + LONGEST_S)
        ready_s, content = time.perf_counter() - begin, IMAGE.read_bytes()
        _ask(port, "POST", "/predict", begin + LONGEST_S, content)
        answer_s = time.perf_counter() - begin
        for _ in range(NUM_REQUESTS - 1):
            _ask(port, "POST", "/predict", begin + LONGEST_S, content)
        has_torch = "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
        resident = family_bytes("VmRSS", process.pid)
    return {"ready_s": ready_s, "answer_s": answer_s, "resident_bytes": resident, "has_torch": has_torch}


@contextmanager
def _server(model: Path) -> Iterator[tuple[Any, int]]:
    import socket
    import subprocess

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    argv = [sys.executable, str(SERVER), str(model), "--port", str(port), "--log-level", "error"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        yield process, port
    finally:
        process.terminate()
        process.wait(LONGEST_S)


def _ask(port: int, method: str, path: str, until: float, content: bytes | None = None) -> None:
    """Ask again where the server does not listen yet; an answer that is not 200 is an error."""
    import http.client
    import time

    headers = {"Content-Type": "image/png"} if content else {}
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONGEST_S)
        try:
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            body = answer.read()
        except ConnectionError as error:
            if time.perf_counter() > until:
                raise Refusal(f"the server did not answer within {LONGEST_S:.0f} s ({error}); see its error") from error
            time.sleep(POLL_S)
            continue
        finally:
            connection.close()
        if answer.status != 200:
            raise Refusal(f"{method} {path} answered {answer.status}: {body[:200]!r}")
        return


def _phases(model: Path) -> dict[str, float]:
    """Seconds of the steps of a start, one after another in this process."""
    import subprocess
    import time

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
    """Milliseconds that each package's modules take to import by themselves, sorted, for every run."""
    import subprocess
    from collections import defaultdict

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
