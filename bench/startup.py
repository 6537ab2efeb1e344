"""python bench/startup.py: from starting the server to its first answer, and its memory."""

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.page import Measurement, describe_machine, publish, render
from bench.lab.rounds import turns
from bench.lab.server import IMAGE, MODEL, start
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
    from bench.servers.race import write_net  # which imports torch

    rounds = 3 if config.quick else config.rounds
    with tempfile.TemporaryDirectory() as folder:
        paths = config.models or (write_net("tiny", (), Path(folder)).path, MODEL)
        models: dict[Path, dict[str, Any]] = {
            path: {"name": path.name, "file_bytes": path.stat().st_size, "starts": []} for path in paths
        }
        with progress(make_console(), "starts", (rounds + 1) * len(models)) as advance:
            for index, turn in turns(paths, rounds, warm_up=True):  # which fills the page cache
                for path in turn:
                    measured = _start(path)
                    if index >= 0:
                        models[path]["starts"].append(measured)
                    advance(note=path.name)
    machine = describe_machine("onnxruntime-gpu", "onnxruntime", "fastapi", "pydantic", "uvicorn", "numpy")
    publish(config, "startup", page, machine=machine, rounds=rounds, models=list(models.values()))


def page(record: Mapping[str, Any]) -> str:
    return render("startup", record, num_requests=NUM_REQUESTS)


def _start(model: Path) -> dict[str, Any]:
    """One server from its first instruction to its last request."""
    begin, image = time.perf_counter(), IMAGE.read_bytes()
    with start(model, "--runtime", "auto", "--log-level", "error") as server:
        ready_s = time.perf_counter() - begin
        ask = partial(server.client.post, "/predict", content=image, headers={"Content-Type": "image/png"})
        statuses = [ask().status_code]
        answer_s = time.perf_counter() - begin
        statuses += [ask().status_code for _ in range(NUM_REQUESTS - 1)]
        has_torch = "libtorch" in Path(f"/proc/{server.pid}/maps").read_text()
        resident = server.rss_bytes(with_children=True)
    if set(statuses) != {200}:
        raise Refusal(f"POST /predict answered {sorted(set(statuses))}")
    return {"ready_s": ready_s, "answer_s": answer_s, "resident_bytes": resident, "has_torch": has_torch}


if __name__ == "__main__":
    sys.exit(run_command(command, StartupConfig, examples=EXAMPLES))
