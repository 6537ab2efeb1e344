"""python bench/accidents.py: signals before a server serves, lost files, models that hang, logs that nobody reads."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.page import describe_machine, machine_table, table, write_page
from common.cli import POSITIONAL, run_command

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = (
    "python bench/accidents.py                        # a minute; writes docs/benchmarks/accidents.md and its record",
    "python bench/accidents.py --requests 500 --out /tmp/accidents",
)
RELOAD_S, DRAIN_S = 20, 2
GROWTH_MB = 8.0  # what lines that wait, and allocators, may take


@dataclass(frozen=True)
class AccidentsConfig:
    model: Annotated[Path, "plain.onnx to serve", POSITIONAL] = ROOT / "models" / "fashion-mnist.onnx"
    image: Annotated[Path, "the image that is asked for"] = ROOT / "models" / "held-out" / "Coat_6.png"
    requests: Annotated[int, "how many are sent to a server whose log nobody reads"] = 20_000
    out: Annotated[Path, "folder for accidents.md and accidents.json"] = ROOT / "docs" / "benchmarks"


def command(config: AccidentsConfig) -> int:
    """Do to a server on 127.0.0.1 what happens at the wrong time. Exit status 1 where a bar is missed."""
    from common.files import read_whole

    image = read_whole(config.image)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "served.onnx")
        record: dict[str, Any] = {"machine": describe_machine("onnxruntime-gpu", "uvicorn"), "model": config.model.name}
        for name, accident in (("early", _early), ("outage", _outage), ("hanging", _hanging)):
            shutil.copy(config.model, model)
            record[name] = accident(model, image)
        shutil.copy(config.model, model)
        record["unread"] = _unread(model, image, config.requests)
    print(write_page(config.out, "accidents", markdown(record), record))
    missed = [bar for name in _TITLES for bar, is_met in record[name]["bars"].items() if not is_met]
    for bar in missed:
        print(f"missed: {bar}")
    return 1 if missed else 0


def _early(model: Path, image: bytes) -> dict[str, Any]:
    """SIGTERM while the model is read from a pipe that gives nothing, as a hung mount does."""
    model.unlink()
    os.mkfifo(model)
    seconds = {}
    for workers in (1, 2):
        server = _start(model, "--workers", workers)
        with model.open("wb"):  # returns when somebody reads
            seconds[f"{workers} worker{'s' * (workers > 1)}"] = _end(server)
    model.unlink()
    return {"seconds": seconds, "bars": {"a server that reads its model ends within 5 s": max(seconds.values()) < 5}}


def _outage(model: Path, image: bytes) -> dict[str, Any]:
    """The file is lost and one worker of two is killed."""
    from bench.process import Server

    with Server(model, "--workers", 2, "--model-threads", 1) as server:
        statuses = [_ask(server.url, image) for _ in range(20)]
        model.write_bytes(b"no model")
        server.wait_for("serves")
        num_lines, start = len(server.log), time.monotonic()
        os.kill(server.workers()[0], signal.SIGKILL)
        while not any("serves" in line for line in server.log[num_lines:]):
            statuses.append(_ask(server.url, image))
        recovery_s = time.monotonic() - start
        statuses += [_ask(server.url, image) for _ in range(20)]
        server.send(signal.SIGTERM)
        status = server.wait()
    lost = sum(status != 200 for status in statuses)
    bars = {"the killed worker comes back without its file": True, "exit status 0": status == 0}
    return {"requests": len(statuses), "lost": lost, "recovery_s": recovery_s, "bars": bars}


def _hanging(model: Path, image: bytes) -> dict[str, Any]:
    """A model without an end is given up, the next one is served; SIGTERM does not wait for another."""
    from bench.process import Server

    good = model.read_bytes()
    with Server(model, "--reload-seconds", RELOAD_S, "--drain-seconds", DRAIN_S) as server:
        _write_endless(model)
        start = time.monotonic()
        server.send(signal.SIGHUP)
        server.wait_for("does not answer within")
        given_up_s = time.monotonic() - start
        model.write_bytes(good)
        server.send(signal.SIGHUP)
        server.wait_for("now serving")
        _write_endless(model)
        num_lines = len(server.log)
        server.send(signal.SIGHUP)
        server.wait_for("reading the model's file again", after=num_lines)
        answered = _ask(server.url, image) == 200
        start = time.monotonic()
        server.send(signal.SIGTERM)
        status = server.wait()
        end_s = time.monotonic() - start
    bars = {
        "a model that hangs is given up, and the next one is served": True,
        "requests are answered meanwhile": answered,
        f"the end comes within {DRAIN_S + 3} s": status == 0 and end_s < DRAIN_S + 3,
    }
    return {"given_up_s": given_up_s, "end_s": end_s, "bars": bars}


def _unread(model: Path, image: bytes, num_requests: int) -> dict[str, Any]:
    """Requests to servers whose log goes into a pipe that nobody reads, and to a disk that is full."""
    found: dict[str, dict[str, float]] = {}
    with open("/dev/full", "wb") as full:
        for name, stderr in (("a pipe that nobody reads", subprocess.PIPE), ("a full disk", full)):
            server = _start(model, stderr=stderr)
            url = _url(server)
            _ask_often(url, image, num_requests // 4)
            before = _rss_mb(server.pid)
            answered = _ask_often(url, image, num_requests)
            found[name] = {"answered": answered, "growth_mb": _rss_mb(server.pid) - before, "end_s": _end(server)}
    bars = {
        "every request is answered": all(row["answered"] == num_requests for row in found.values()),
        f"memory grows by less than {GROWTH_MB:g} MB": all(row["growth_mb"] < GROWTH_MB for row in found.values()),
    }
    return {"requests": num_requests, "logs": found, "bars": bars}


def _start(model: Path, *argv: Any, stderr: Any = subprocess.DEVNULL) -> "subprocess.Popen[str]":
    options = ["--runtime", "onnxruntime", "--port", "0", *map(str, argv)]
    program = [sys.executable, str(ROOT / "serve" / "run.py"), str(model), *options]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=stderr, text=True)


def _url(server: "subprocess.Popen[str]") -> str:
    assert server.stdout
    text = server.stdout.readline() + server.stdout.readline()
    found = re.search(r"http://[\d.:]+", text)
    assert found, text
    return found.group()


def _end(server: "subprocess.Popen[str]") -> float:
    start = time.monotonic()
    server.send_signal(signal.SIGTERM)
    server.wait(60)
    return time.monotonic() - start


def _ask(url: str, image: bytes) -> int:
    """The status; 0 where the connection was lost."""
    import httpx

    try:
        return httpx.post(
            f"{url}/predict", content=image, headers={"Content-Type": "image/png"}, timeout=30
        ).status_code
    except httpx.TransportError:
        return 0


def _ask_often(url: str, image: bytes, num: int) -> int:
    """How many of `num` requests on one connection are answered 200."""
    import httpx

    with httpx.Client(timeout=30, headers={"Content-Type": "image/png"}) as client:
        return sum(client.post(f"{url}/predict", content=image).status_code == 200 for _ in range(num))


def _rss_mb(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _write_endless(path: Path) -> None:
    """A classifier whose Loop has no end."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    value = helper.make_tensor_value_info
    turn, go = value("turn", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])
    y, on = value("y", TensorProto.FLOAT, None), value("on", TensorProto.BOOL, [])
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["y"], ["z"])]
    body = helper.make_graph(nodes, "body", [turn, go, y], [on, value("z", TensorProto.FLOAT, None)])
    mean = helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0)
    loop = helper.make_node("Loop", ["", "true", "mean"], ["scores"], body=body)
    inputs, outputs = (
        value(name, TensorProto.FLOAT, shape) for name, shape in (("x", ["N", 3, 8, 8]), ("scores", ["N", 3]))
    )
    graph = helper.make_graph(
        [mean, loop], "endless", [inputs], [outputs], [numpy_helper.from_array(np.array(True), "true")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


_TITLES = {
    "early": "SIGTERM before it serves",
    "outage": "One worker of two is killed, and the model's file is damaged",
    "hanging": "A new model that hangs",
    "unread": "A log that cannot be written",
}


def markdown(record: dict[str, Any]) -> str:
    """The page of one record."""
    outage, hanging, unread = record["outage"], record["hanging"], record["unread"]
    bars = [
        (title, bar, "met" if is_met else "MISSED")
        for name, title in _TITLES.items()
        for bar, is_met in record[name]["bars"].items()
    ]
    texts = {
        "early": "The model is read from a pipe that gives nothing, as a mount that hangs does. Seconds from SIGTERM "
        "to the end: "
        + ", ".join(f"{value:.2f} with {name}" for name, value in record["early"]["seconds"].items())
        + ".",
        "outage": f"Requests are asked one after another. Of {outage['requests']} {outage['lost']} were lost, which "
        f"the killed worker had taken; after {outage['recovery_s']:.1f} s another one served, from the copy that the "
        "server keeps.",
        "hanging": f"Its `Loop` has no end. With `--reload-seconds {RELOAD_S}` it was given up after "
        f"{hanging['given_up_s']:.1f} s, and the next model served. SIGTERM while another one hung ended the server in "
        f"{hanging['end_s']:.2f} s.",
        "unread": table(
            ("the log goes to", f"answered 200 of {unread['requests']:,}", "memory grew by", "SIGTERM took"),
            [
                (name, f"{row['answered']:,}", f"{row['growth_mb']:.1f} MB", f"{row['end_s']:.2f} s")
                for name, row in unread["logs"].items()
            ],
        ),
    }
    parts = [
        "# What happens to a server at the wrong time",
        "Written by `python bench/accidents.py`. It serves "
        f"`{record['model']}` and asks it from the same machine. The record is [accidents.json](accidents.json); what "
        "the server promises stands in [deployment.md](../deployment.md#signals-workers-and-the-log).",
        machine_table(record["machine"]),
        table(("", "bar", ""), bars),
    ]
    for name, title in _TITLES.items():
        parts += [f"## {title}", texts[name]]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(command, AccidentsConfig, examples=EXAMPLES))
