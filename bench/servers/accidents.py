"""Accidents: a signal before the server serves, a lost file, a model that hangs, a log that cannot be written."""

import os
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.lab.server import start

RELOAD_S, DRAIN_S = 20, 2
GROWTH_MB = 8.0  # for lines that wait, and for allocators
ENDLESS = """
<ir_version: 9, opset_import: ["": 17]>
endless (float[N, 3, 8, 8] x) => (float[N, 3] scores) <bool true = {1}> {
  mean = ReduceMean <axes = [2, 3], keepdims = 0> (x)
  scores = Loop <body = turns (int64 turn, bool go, float y) => (bool on, float z) {
    on = Identity (go)
    z = Neg (y)
  }> ("", true, mean)
}"""


def early(model: Path) -> dict[str, Any]:
    """SIGTERM while the model is read from a pipe that delivers nothing, like a mount that hangs."""
    model.unlink()
    os.mkfifo(model)
    seconds = []
    for workers in (1, 2):
        with ExitStack() as stack:
            stack.push(server := start(model, "--workers", workers))  # it never becomes ready
            with model.open("wb"):  # waits for a reader
                seconds.append(server.stop())
    model.unlink()
    return {"seconds": seconds, "bars": {"a server that reads its model ends within 5 s": max(seconds) < 5}}


def outage(model: Path, image: bytes) -> dict[str, Any]:
    """One of two workers is killed after the model's file was damaged; requests are sent one after another."""
    with start(model, "--workers", 2, "--model-threads", 1) as server:
        statuses = [server.predict(image) for _ in range(20)]
        server.wait_for("serves", num=2)  # or the second worker may read the damaged file
        model.write_bytes(b"no model")
        num_lines, begin = len(server.log()), time.monotonic()
        os.kill(server.workers()[0], signal.SIGKILL)
        while not any("serves" in line for line in server.log()[num_lines:]):
            statuses.append(server.predict(image))
        recovery_s = time.monotonic() - begin
        statuses += [server.predict(image) for _ in range(20)]
        server.stop()
    lost = sum(status != 200 for status in statuses)
    bars = {"the killed worker comes back without its file": True, "exit status 0": server.exit_status == 0}
    return {"requests": len(statuses), "lost": lost, "recovery_s": recovery_s, "bars": bars}


def hanging(model: Path, image: bytes) -> dict[str, Any]:
    """A classifier whose Loop has no end is given up, the next one is served; SIGTERM does not wait for another."""
    from onnx import parser

    good, endless = model.read_bytes(), parser.parse_model(ENDLESS).SerializeToString()
    with start(model, "--reload-seconds", RELOAD_S, "--drain-seconds", DRAIN_S) as server:
        model.write_bytes(endless)
        begin = time.monotonic()
        server.reload("does not answer within")
        given_up_s = time.monotonic() - begin
        model.write_bytes(good)
        server.reload("now serving")
        model.write_bytes(endless)
        server.reload("reading the model's file again")
        answered = server.predict(image) == 200
        end_s = server.stop()
    bars = {
        "a model that hangs is given up, and the next one is served": True,
        "requests are answered meanwhile": answered,
        f"the end comes within {DRAIN_S + 3} s": server.exit_status == 0 and end_s < DRAIN_S + 3,
    }
    return {"reload_s": RELOAD_S, "given_up_s": given_up_s, "end_s": end_s, "bars": bars}


def unread(model: Path, image: bytes, *, num_requests: int) -> dict[str, Any]:
    """Requests to servers whose log goes into a pipe that nobody reads, and to a full disk."""
    headers = {"Content-Type": "image/png", "Connection": "keep-alive"}

    def num_answered(num: int) -> int:
        answers = (server.client.post("/predict", content=image, headers=headers) for _ in range(num))
        return sum(answer.status_code == 200 for answer in answers)

    logs: dict[str, dict[str, float]] = {}
    with open("/dev/full", "wb") as full:
        for name, stderr in (("a pipe that nobody reads", subprocess.PIPE), ("a full disk", full)):
            with start(model, stderr=stderr) as server:
                num_answered(num_requests // 4)
                before = server.rss_bytes()
                answered = num_answered(num_requests)
                growth_mb = (server.rss_bytes() - before) / 1e6
                logs[name] = {"answered": answered, "growth_mb": growth_mb, "end_s": server.stop()}
    bars = {
        "every request is answered": all(log["answered"] == num_requests for log in logs.values()),
        f"memory grows by less than {GROWTH_MB:g} MB": all(log["growth_mb"] < GROWTH_MB for log in logs.values()),
    }
    return {"requests": num_requests, "logs": logs, "bars": bars}
