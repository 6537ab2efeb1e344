"""One process that serves, or several that share one socket under a supervisor."""

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from export.runtimes.described import from_flags
from export.runtimes.load import load_runtime
from export.runtimes.runtime import Runtime
from export.runtimes.saturation import warning
from serve import logs
from serve.access import Access, read_api_key
from serve.app import make_app
from serve.choose import choose
from serve.connection import Connection
from serve.limits import Limits
from serve.metrics import COUNTS_VARIABLE
from serve.reload import check
from serve.report import with_report
from serve.tracing import find_tracing
from train.cores import num_cores
from train.files import read_whole
from train.refusal import Refusal

if TYPE_CHECKING:
    from serve.run import ServeConfig

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_START_S = 120.0  # for a worker to load its model


def run(config: "ServeConfig", listener: socket.socket, url: str) -> int:
    """Serve on `listener` until a signal ends it; the exit status."""
    logs.configure(config.log_level)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after a clean end, which has status 0
    limits_of(config)  # what is refused is refused before anything is measured
    config, reason = decide(config)
    if config.workers > 1:
        return _supervise(config, listener, url, reason)
    server = _make_server(config, url, reason)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has finished its requests and hands the signal on
        print("stopped", flush=True)
    return 0 if server.started else 1


def decide(config: "ServeConfig") -> tuple["ServeConfig", str]:
    """The config with one file and its runtime, which workers and reloads keep; and why these."""
    choice = choose(
        config.model_paths,
        runtime=config.runtime_name,
        devices=config.devices,
        num_threads=_num_threads(config),
        max_batch=config.max_batch,
    )
    return replace(config, models=(choice.path,), runtime=choice.runtime or "auto"), choice.reason


def _supervise(config: "ServeConfig", listener: socket.socket, url: str, reason: str) -> int:
    """Several workers, which count requests together in files of a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="diracnet-metrics-") as folder:
        os.environ[COUNTS_VARIABLE] = folder  # the workers inherit it
        supervisor = _Supervisor(config, listener, url, reason)
        supervisor.run()
    return 0 if supervisor.has_served else 2


def _make_server(config: "ServeConfig", url: str, reason: str) -> "_Server":
    runtimes = load(config)
    server = _Server(_settings(config, _make_app(config, runtimes)))
    server.greeting = f"{_because(_describe(runtimes[0]), reason)}\n{_serving_at(url)}"
    return server


def load(config: "ServeConfig") -> list[Runtime]:
    """The model, checked, once for each device. What is refused is said without the file's folder."""
    (path,), name, num_threads = config.model_paths, config.runtime_name, _num_threads(config)
    try:
        runtimes = [
            load_runtime(path, name=name, device=device, num_threads=num_threads, said=from_flags(config))
            for device in config.devices or (None,)
        ]
        for runtime in runtimes:
            runtime.model = with_report(runtime.model, path)
            check(runtime)
        if path.suffix == ".onnx" and not config.devices and (doubt := warning(path, read_whole(path))):
            _log.warning(doubt)
    except Refusal as refusal:
        raise Refusal(str(refusal).replace(str(path), path.name)) from refusal
    return runtimes


def _num_threads(config: "ServeConfig") -> int:
    """Of one model on the CPU."""
    return config.model_threads or max(1, num_cores() // config.workers)


def limits_of(config: "ServeConfig") -> Limits:
    """What was asked for, and what suits the machine."""
    spare = num_cores() // config.workers - 1  # one core has the event loop and the model
    return Limits(
        max_body_bytes=int(config.max_body_mb * 1e6),
        max_held_bytes=int(config.max_held_mb * 1e6),
        max_decoded_bytes=int(config.max_decoded_mb * 1e6),
        max_images=config.max_images,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        deadline_s=config.deadline_ms / 1000,
        decode_threads=min(max(spare, 0), 4) if config.decode_threads is None else config.decode_threads,
    )


def _make_app(config: "ServeConfig", runtimes: Sequence[Runtime]) -> FastAPI:
    observers = [logs.RequestLog(sys.stderr.buffer)] if logging.getLogger().isEnabledFor(logging.INFO) else []
    tracing = find_tracing()
    app = make_app(
        runtimes,
        limits_of(config),
        access=Access(read_api_key(config.api_key_file, os.environ), config.cors_origin),
        load=partial(load, config),
        observers=[*observers, *([tracing] if tracing else [])],
        reload_everywhere=_tell_supervisor if config.workers > 1 else None,
    )
    # What is there by now stays. Collections that walk through all of it hold up every hundredth answer for 30 ms.
    gc.collect()
    gc.freeze()
    return app


def _settings(config: "ServeConfig", app: FastAPI | partial[FastAPI], *, workers: int = 1) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=isinstance(app, partial),
        workers=workers,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody's word for where a request comes from is needed, or taken
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=config.drain_seconds,
    )


class _Server(uvicorn.Server):
    """Says where it is once it listens."""

    greeting = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            print(self.greeting, flush=True)


class _Supervisor(Multiprocess):
    """Replaces a worker that ends; hands SIGHUP on to all of them."""

    def __init__(self, config: "ServeConfig", listener: socket.socket, url: str, reason: str) -> None:
        super().__init__(_settings(config, partial(_make_worker, config), workers=config.workers), [listener])
        logging.getLogger("uvicorn.error").setLevel(logging.INFO)  # which worker ended and when
        self._url, self._reason = url, reason
        self.has_served = False

    def init_processes(self) -> None:
        super().init_processes()
        self.has_served = all(process.wait_until_ready(_START_S, self.should_exit) for process in self.processes)
        if self.has_served:
            print(f"{_because(f'{self.processes_num} workers', self._reason)}\n{_serving_at(self._url)}", flush=True)

    def keep_subprocess_alive(self) -> None:
        before = {process.pid for process in self.processes}
        super().keep_subprocess_alive()
        for pid in before - {process.pid for process in self.processes}:
            if pid:
                mark_process_dead(pid)  # what it counted stays; what it held is gone

    def handle_hup(self) -> None:
        for process in self.processes:
            if process.pid:
                os.kill(process.pid, signal.SIGHUP)


def _make_worker(config: "ServeConfig") -> FastAPI:
    logs.configure(config.log_level)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the file is about to be read anyway
    if sys.platform == "linux":  # a supervisor that is killed leaves no worker behind that holds the port
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        return _make_app(config, load(config))
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


def _tell_supervisor() -> None:
    os.kill(os.getppid(), signal.SIGHUP)


def _describe(runtime: Runtime) -> str:
    what = f"{runtime.model.name} ({runtime.model.digest[:12]}) on {runtime.description} ({runtime.library})"
    reading = runtime.model.reading
    if reading is None:
        return what
    more = "; say otherwise with --mean, --std, --resize, --labels and the like" if reading.assumed else ""
    return f"{what}, not a file of this project; {reading}{more}"


def _because(what: str, reason: str) -> str:
    return f"{what}: {reason}" if reason else what


def _serving_at(url: str) -> str:
    return f"serving at {url}  (Ctrl-C stops)"
