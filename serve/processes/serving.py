"""One process that serves, several workers that share one socket, or front ends and the processes of their devices."""

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
from prometheus_client import CollectorRegistry

from common.environment import num_cores
from common.refusal import Refusal
from export.runtimes.cascade import read_forms
from export.runtimes.runtime import Runtime
from serve.config import ServeConfig
from serve.decode.process import HostBudget
from serve.front_ends.batcher import FrontBatcher
from serve.front_ends.device import Device, DeviceServer
from serve.front_ends.link import Dialer
from serve.model.check import LoadModel, warm_up
from serve.model.choose import choose
from serve.model.load import Roles, load, load_again, load_first
from serve.processes.signals import end_with_parent
from serve.processes.supervisor import Kinds, Server, Supervisor, Worker
from serve.request.access import Access, read_api_key
from serve.request.app import make_app
from serve.request.batcher import Batcher
from serve.request.connection import Connection
from serve.request.job import Served
from serve.request.limits import Limits, fit_to_files
from serve.request.uvicorn_internals import STARTUP_FAILURE
from serve.shadow.shadow import Shadow, refuse_unfit, start_process
from serve.watching import logs
from serve.watching.metrics import Computed
from serve.watching.shared_counts import COUNTS_VARIABLE
from serve.watching.tracing import find_tracing

LoadFirst = Callable[[Roles, Path], Sequence[Runtime]]


def run(config: ServeConfig, listener: socket.socket, url: str, *, load_on_device: LoadFirst = load_first) -> int:
    """Serve on `listener` until a signal; the exit status.

    `load_on_device` is how the process of a device loads its model first; it is pickled by name.
    """
    stream = logs.configure(config.log_level)
    limits_of(config)  # refuses before anything is measured
    config, reason = decide(config)  # workers and reloads keep these files and this runtime
    if config.workers == config.front_ends == 1:
        server = _make_server(config, url, reason, stream)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # raised again by uvicorn once its requests are finished
            print("stopped", flush=True)
        return 0 if server.started else 1
    with _folders() as home:
        if config.front_ends > 1:
            what, kinds = _front_ends(config, listener, home, load_on_device)
        else:
            what, kinds = _workers(config, listener, home)
        say_ready = partial(print, _greeting(what, reason, url), flush=True)
        return 0 if Supervisor(kinds, drain_s=config.drain_seconds, say_ready=say_ready).run() else 2


def decide(config: ServeConfig) -> tuple[ServeConfig, str]:
    """The config with one file, or the two of a cascade, and their runtime; and the reason for the choice."""
    if config.cascade:
        forms = read_forms(config.model_paths)
        return replace(config, models=config.model_paths, runtime="onnxruntime"), str(forms)
    return choose(config)


def _make_server(config: ServeConfig, url: str, reason: str, stream: logs.LogStream) -> Server:
    """Only the app keeps the model, which a reload replaces."""
    runtimes, roles = load(config), Roles(config)
    shadow = _make_shadow(config, roles)
    if shadow:
        shadow.prepare(runtimes[0].model)
    app = whole_app(config, runtimes, stream, load=lambda: load_again(roles.served), shadow=shadow)
    return Server(_uvicorn_config(config, app), _greeting(_runtime_line(runtimes[0]), reason, url))


def _workers(config: ServeConfig, listener: socket.socket, home: Path) -> tuple[str, Kinds]:
    """Several workers, each with its own copy of the model."""
    if config.shadow:  # each of them would only log the refusal and serve without a shadow
        roles = Roles(config)
        with start_process(roles.served) as served, start_process(roles.shadow) as shadow:
            refuse_unfit(served.model, shadow.model)
    worker = partial(Worker, _uvicorn_config(config, partial(_make_worker, config, home)), [listener])
    return f"{config.workers} workers", {"worker": config.workers * [worker]}


def _make_worker(config: ServeConfig, home: Path) -> FastAPI:
    with _started(config) as stream:
        roles = Roles(config, home)
        return whole_app(
            config,
            load_first(roles, home),
            stream,
            load=lambda: load_again(roles.served, home),
            shadow=_make_shadow(config, roles, home),
            reload_everywhere=_tell_supervisor,
        )


def _front_ends(config: ServeConfig, listener: socket.socket, home: Path, load: LoadFirst) -> tuple[str, Kinds]:
    """Front ends, which accept, decode and answer, and one process for each device, which runs the model."""
    doors = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(config.front_ends)]
    budget = home.with_name("decoders")
    budget.touch()
    fronts, models = [], []
    for outside, _ in doors:
        settings = _uvicorn_config(config, partial(_make_front_end, config, outside, budget))
        fronts.append(partial(Worker, settings, [listener]))
    devices = [(device,) for device in config.devices] or [()]
    for index, device in enumerate(devices):
        settings = _uvicorn_config(config, partial(_make_device, replace(config, devices=device), home, load))
        sockets = [inside for _, inside in doors[index :: len(devices)]]
        models.append(partial(Worker, settings, sockets, DeviceServer))
    what = f"{len(fronts)} front ends, {len(models)} device process{'es' if len(models) > 1 else ''}"
    return what, {"front end": fronts, "device process": models}


def _make_front_end(config: ServeConfig, door: socket.socket, budget: Path) -> FastAPI:
    with _started(config) as stream:
        limits = limits_of(config)
        batcher = FrontBatcher(Dialer(door), limits, HostBudget(budget, limits.heavy_bytes))
        tell = _tell_supervisor if len(config.devices) > 1 else None
        return whole_app(config, batcher, stream, load=batcher.reload, reload_everywhere=tell)


def _make_device(config: ServeConfig, home: Path, load: LoadFirst, doors: Sequence[socket.socket]) -> Device:
    with _started(config):
        limits = limits_of(config)
        served = Served(tuple(load(Roles(config, home), home)))
        warm_up(served.runtimes, limits.max_batch)
        device = Device(served, doors, limits, load=partial(load_again, config, home))
        computed = Computed(CollectorRegistry())
        device.observe_batch, device.observe_run = computed.observe_batch, computed.observe_run
        _freeze_garbage()
        return device


@contextmanager
def _folders() -> Iterator[Path]:
    """A folder for a copy of the model that served last; the processes count requests in another one beside it."""
    with tempfile.TemporaryDirectory(prefix="diracnet-workers-") as folder:
        counts, home = Path(folder, "counts"), Path(folder, "model")
        counts.mkdir()
        home.mkdir()
        os.environ[COUNTS_VARIABLE] = str(counts)  # the processes inherit it
        yield home


@contextmanager
def _started(config: ServeConfig) -> Iterator[logs.LogStream]:
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


def _tell_supervisor() -> None:
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
    load: LoadModel,
    shadow: Shadow | None = None,
    reload_everywhere: Callable[[], None] | None = None,
) -> FastAPI:
    """The app of one process, with its log, metrics and traces."""
    log = logs.RequestLog(stream) if logging.getLogger().isEnabledFor(logging.INFO) else None
    limits = limits_of(config)
    app = make_app(
        runtimes,
        replace(limits, max_connections=fit_to_files(limits.max_connections)),
        access=Access(read_api_key(config.api_key_file, os.environ), config.cors_origin),
        load=load,
        observers=[observe for observe in (log, find_tracing()) if observe],
        reload_everywhere=reload_everywhere,
        grpc_address=config.grpc_address,
        shadow=shadow,
    )
    stream.on_drop = app.metrics.count_dropped_lines
    _freeze_garbage()
    return app


def _freeze_garbage() -> None:
    """All objects up to here stay; collections that visit them would delay every hundredth answer by 30 ms."""
    gc.collect()
    gc.freeze()


def _uvicorn_config(config: ServeConfig, app: FastAPI | partial[Any]) -> uvicorn.Config:
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


def _greeting(what: str, reason: str, url: str) -> str:
    """The model or processes that serve, why they were chosen, and the address."""
    return f"{what}{': ' if reason else ''}{reason}\nserving at {url}  (Ctrl-C stops)"


def _runtime_line(runtime: Runtime) -> str:
    what = f"{runtime.model.name} ({runtime.model.digest[:12]}) on {runtime.description} ({runtime.library})"
    reading = runtime.model.reading
    if reading is None:
        return what
    more = "; override with --mean, --std, --resize, --labels and the like" if reading.assumed else ""
    return f"{what}, not a file of this project; {reading}{more}"
