"""One process that serves, or several workers that share one socket under a supervisor."""

import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from common.cores import num_cores
from common.refusal import Refusal
from export.runtimes.cascade import read_forms
from export.runtimes.runtime import Runtime
from serve.config import ServeConfig
from serve.model.check import Load
from serve.model.choose import choose
from serve.model.load import Roles, load, load_again, load_first, num_threads
from serve.processes.signals import end_with_parent
from serve.processes.supervisor import Role, Server, Supervisor, Worker
from serve.request.access import Access, read_api_key
from serve.request.app import make_app
from serve.request.batcher import Batcher
from serve.request.connection import Connection
from serve.request.limits import Limits, fit_to_files
from serve.request.uvicorn_internals import STARTUP_FAILURE
from serve.shadow.shadow import Shadow, refuse_unfit, start_process
from serve.watching import logs
from serve.watching.shared_counts import COUNTS_VARIABLE
from serve.watching.tracing import find_tracing


def run(config: ServeConfig, listener: socket.socket, url: str) -> int:
    """Serve on `listener` until a signal; the exit status."""
    config, reason, stream = begin(config)
    if config.workers > 1:
        _refuse_unfit_shadow(config)
        return _run_workers(config, listener, url, reason)
    server = _make_server(config, url, reason, stream)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # raised again by uvicorn once its requests are finished
        print("stopped", flush=True)
    return 0 if server.started else 1


def begin(config: ServeConfig) -> tuple[ServeConfig, str, logs.LogStream]:
    """Start the log and decide on a model: the config with its files and runtime, and the reason for them.

    Workers and reloads keep these files and this runtime.
    """
    stream = logs.configure(config.log_level)
    limits_of(config)  # refuses before anything is measured
    return *decide(config), stream


def decide(config: ServeConfig) -> tuple[ServeConfig, str]:
    """The config with one file, or the two of a cascade, and their runtime; and the reason for the choice."""
    if config.cascade:
        forms = read_forms(config.model_paths)
        return replace(config, models=config.model_paths, runtime="onnxruntime"), str(forms)
    choice = choose(
        config.model_paths,
        runtime=config.runtime_name,
        devices=config.devices,
        num_threads=num_threads(config),
        max_batch=config.max_batch,
    )
    return replace(config, models=(choice.path,), runtime=choice.runtime or "auto"), choice.reason


def _make_server(config: ServeConfig, url: str, reason: str, stream: logs.LogStream) -> Server:
    runtimes, roles = load(config), Roles(config)
    shadow = _make_shadow(config, roles)
    if shadow:
        shadow.prepare(runtimes[0].model)
    app = whole_app(config, runtimes, stream, load=lambda: load_again(roles.served), shadow=shadow)
    return Server(uvicorn_config(config, app), greeting(_describe(runtimes[0]), reason, url))


def _run_workers(config: ServeConfig, listener: socket.socket, url: str, reason: str) -> int:
    """Several workers, each with its own copy of the model."""
    with folders() as home:
        worker = partial(Worker, uvicorn_config(config, partial(_make_worker, config, home)), [listener])
        text = greeting(f"{config.workers} workers", reason, url)
        return supervise(config, Role("worker", config.workers * [worker]), text=text)


def _make_worker(config: ServeConfig, home: Path) -> FastAPI:
    with started(config) as stream:
        roles = Roles(config, home)
        runtimes, shadow = load_first(roles, home), _make_shadow(config, roles, home)
        return whole_app(
            config,
            runtimes,
            stream,
            load=lambda: load_again(roles.served, home),
            shadow=shadow,
            reload_everywhere=tell_supervisor,
        )


def supervise(config: ServeConfig, *roles: Role, text: str) -> int:
    """Run these processes and print `text` when all are ready; the exit status."""
    say_ready = partial(print, text, flush=True)
    return 0 if Supervisor(*roles, drain_s=config.drain_seconds, say_ready=say_ready).run() else 2


@contextmanager
def folders() -> Iterator[Path]:
    """A folder for a copy of the model that served last; the processes count requests in another one beside it."""
    with tempfile.TemporaryDirectory(prefix="diracnet-workers-") as folder:
        counts, home = Path(folder, "counts"), Path(folder, "model")
        counts.mkdir()
        home.mkdir()
        os.environ[COUNTS_VARIABLE] = str(counts)  # the processes inherit it
        yield home


@contextmanager
def started(config: ServeConfig) -> Iterator[logs.LogStream]:
    """In a process that a supervisor has started; a refusal ends it with one line."""
    stream = logs.configure(config.log_level)
    if supervisor := multiprocessing.parent_process():
        # If the supervisor is killed, no process stays behind that holds the port.
        end_with_parent(signal.SIGTERM, supervisor.pid)
    try:
        yield stream
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


def tell_supervisor() -> None:
    """Have all processes read the model again."""
    os.kill(os.getppid(), signal.SIGHUP)


def limits_of(config: ServeConfig) -> Limits:
    """The limits of each process that serves: as configured, and as suits this machine."""
    spare = num_cores() // max(config.workers, config.front_ends) - 1  # one core has the event loop and the model
    limits = Limits(
        max_body_bytes=int(config.max_body_mb * 1e6),
        max_held_bytes=int(config.max_held_mb * 1e6),
        max_decoded_bytes=int(config.max_decoded_mb * 1e6),
        max_images=config.max_images,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        max_connections=config.max_connections,
        deadline_s=config.deadline_ms / 1000,
        drain_s=config.drain_seconds,
        probe_every_s=config.probe_every,
        decode_threads=min(max(spare, 0), 4) if config.decode_threads is None else config.decode_threads,
    )
    return limits.of_each(config.front_ends)


def whole_app(
    config: ServeConfig,
    runtimes: Sequence[Runtime] | Batcher,
    stream: logs.LogStream,
    *,
    load: Load,
    shadow: Shadow | None = None,
    reload_everywhere: Callable[[], None] | None = None,
) -> FastAPI:
    """The app of one process, with its log, metrics and traces."""
    observers = [logs.RequestLog(stream)] if logging.getLogger().isEnabledFor(logging.INFO) else []
    tracing = find_tracing()
    limits = limits_of(config)
    app = make_app(
        runtimes,
        replace(limits, max_connections=fit_to_files(limits.max_connections)),
        access=Access(read_api_key(config.api_key_file, os.environ), config.cors_origin),
        load=load,
        observers=[*observers, *([tracing] if tracing else [])],
        reload_everywhere=reload_everywhere,
        grpc_address=config.grpc_address,
        shadow=shadow,
    )
    # All objects up to here stay. Collections that visit them would delay every hundredth answer by 30 ms.
    gc.collect()
    gc.freeze()
    return app


def uvicorn_config(config: ServeConfig, app: FastAPI | partial[Any]) -> uvicorn.Config:
    """`app`, or a partial that makes it in the process that serves."""
    return uvicorn.Config(
        app,
        factory=isinstance(app, partial),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the address of a client is not used, so no header about it is trusted
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=config.drain_seconds,
    )


def _make_shadow(config: ServeConfig, roles: Roles, home: Path | None = None) -> Shadow | None:
    if config.shadow is None:
        return None
    return Shadow(
        lambda: roles.shadow,
        lambda digest: load_again(roles.shadow, home, digest),
        roles.swap,
        share=config.shadow_share,
        num_images=config.shadow_images,
        max_batch=config.max_batch,
    )


def _refuse_unfit_shadow(config: ServeConfig) -> None:
    """Before workers start, because each of them would only log the refusal and serve without a shadow."""
    if config.shadow:
        roles = Roles(config)
        with start_process(roles.served) as served, start_process(roles.shadow) as shadow:
            refuse_unfit(served.identity, shadow.identity)


def greeting(what: str, reason: str, url: str) -> str:
    """What serves, why it was chosen, and where."""
    return f"{what}{': ' if reason else ''}{reason}\nserving at {url}  (Ctrl-C stops)"


def _describe(runtime: Runtime) -> str:
    what = f"{runtime.model.name} ({runtime.model.digest[:12]}) on {runtime.description} ({runtime.library})"
    reading = runtime.model.reading
    if reading is None:
        return what
    more = "; override with --mean, --std, --resize, --labels and the like" if reading.assumed else ""
    return f"{what}, not a file of this project; {reading}{more}"
