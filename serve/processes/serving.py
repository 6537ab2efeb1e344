"""One process that serves, or several that share one socket under a supervisor."""

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from uvicorn.config import STARTUP_FAILURE

from common.cores import num_cores
from common.files import read_whole
from common.refusal import Refusal
from export.model_file.onnx_reader import digest_of
from export.model_file.reading import from_flags
from export.runtimes.cascade import Cascade, read_forms
from export.runtimes.load import load_runtime
from export.runtimes.runtime import Runtime
from export.runtimes.saturation import warning
from serve.model.check import Load, check
from serve.model.choose import choose
from serve.model.copies import copied, keep, kept
from serve.model.parity_report import with_report
from serve.model.trial import prove
from serve.processes.supervisor import Role, Server, Supervisor, Worker
from serve.request.access import Access, read_api_key
from serve.request.app import make_app, model_card
from serve.request.batcher import Batcher
from serve.request.connection import Connection
from serve.request.limits import Limits
from serve.request.open_connections import fit_to_files
from serve.shadow.process import ShadowProcess
from serve.shadow.roles import Roles
from serve.shadow.shadow import Shadow, refuse_unfit
from serve.v2.rpc.port import RpcAddress
from serve.watching import logs
from serve.watching.answers import with_sound_reference
from serve.watching.shared_counts import COUNTS_VARIABLE
from serve.watching.tracing import find_tracing

if TYPE_CHECKING:
    from serve.config import ServeConfig

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def run(config: "ServeConfig", listener: socket.socket, url: str) -> int:
    """Serve on `listener` until a signal ends it; the exit status."""
    stream = logs.configure(config.log_level)
    limits_of(config)  # what is refused is refused before anything is measured
    config, reason = decide(config)
    if config.workers > 1:
        _refuse_unfit_shadow(config)
        return _supervise(config, listener, url, reason)
    server = _make_server(config, url, reason, stream)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has finished its requests and hands the signal on
        print("stopped", flush=True)
    return 0 if server.started else 1


def decide(config: "ServeConfig") -> tuple["ServeConfig", str]:
    """The config with one file and its runtime, which workers and reloads keep; and why these. A cascade has two."""
    if config.cascade:
        forms = read_forms(config.model_paths)
        return replace(config, models=config.model_paths, runtime="onnxruntime"), str(forms)
    choice = choose(
        config.model_paths,
        runtime=config.runtime_name,
        devices=config.devices,
        num_threads=_num_threads(config),
        max_batch=config.max_batch,
    )
    return replace(config, models=(choice.path,), runtime=choice.runtime or "auto"), choice.reason


def _supervise(config: "ServeConfig", listener: socket.socket, url: str, reason: str) -> int:
    """Several workers, each with a model of its own."""
    with folders() as home:
        of_worker = settings(config, partial(_make_worker, config, home))
        workers = Role("worker", config.workers * [partial(Worker, of_worker, [listener])])
        ready = partial(say_ready, f"{config.workers} workers", reason, url)
        was_told = Supervisor(workers, drain_s=config.drain_seconds, say_ready=ready).run()
    return 0 if was_told else 2


@contextmanager
def folders() -> Iterator[Path]:
    """A folder in which processes keep a copy of the model that served last; they count requests in another one."""
    with tempfile.TemporaryDirectory(prefix="diracnet-workers-") as folder:
        counts, home = Path(folder, "counts"), Path(folder, "model")
        counts.mkdir()
        home.mkdir()
        os.environ[COUNTS_VARIABLE] = str(counts)  # the processes inherit it
        yield home


def say_ready(what: str, reason: str, url: str) -> None:
    """What serves, why it was chosen, and where."""
    print(f"{_because(what, reason)}\n{_serving_at(url)}", flush=True)


def _make_server(config: "ServeConfig", url: str, reason: str, stream: logs.LogStream) -> Server:
    runtimes, roles = load(config), Roles(config)
    shadow = _make_shadow(config, roles)
    if shadow:
        shadow.prepare(runtimes[0].model)
    app = whole_app(config, runtimes, stream, load=partial(_load_served, roles), shadow=shadow)
    server = Server(settings(config, app))
    server.greeting = f"{_because(_describe(runtimes[0]), reason)}\n{_serving_at(url)}"
    return server


def load(config: "ServeConfig") -> list[Runtime]:
    """The model, checked, once for each device. What is refused is said without the file's folder."""
    paths = config.model_paths
    with _by_name(paths):
        forms = read_forms(paths) if config.cascade else None
        runtimes: list[Runtime] = []
        for device in config.devices or (None,):
            loaded = {path: _load_file(config, path, device) for path in paths}
            runtime = loaded[paths[0]]
            if forms:
                runtime = Cascade(loaded[forms.quick], loaded[forms.exact], forms.evidence)
                check(runtime)
            _refuse_what_cannot_be_shown(runtime)
            runtimes.append(runtime)
        for path in paths:
            if path.suffix == ".onnx" and not config.devices and (doubt := warning(path, read_whole(path))):
                _log.warning(doubt)
    return runtimes


def _load_file(config: "ServeConfig", path: Path, device: int | None) -> Runtime:
    runtime = load_runtime(
        path,
        name=config.runtime_name,
        device=device,
        num_threads=_num_threads(config),
        shares_cores=config.cascade,
        hints=from_flags(config),
    )
    runtime.model = with_sound_reference(with_report(runtime.model, path))
    check(runtime)
    return runtime


def _refuse_what_cannot_be_shown(runtime: Runtime) -> None:
    """What GET /model and every answer say of the model must be JSON, before anybody asks."""
    try:
        JSONResponse(model_card(runtime))
    except (ValueError, TypeError, RecursionError) as error:
        raise Refusal(f"what {runtime.model.name} says of itself cannot be shown: {error}; export it again") from error


def load_again(config: "ServeConfig", home: Path | None = None, digest: str | None = None) -> list[Runtime]:
    """The model as its files are now, first tried in another process. What is tried is a copy, kept in `home`.

    Refuses a file that has another digest than the one that is asked for.
    """
    paths = config.model_paths
    with _by_name(paths), copied(paths, home) as copies, _by_name(copies):
        if digest and digest != digest_of(copies[0], read_whole(copies[0])):
            raise Refusal(f"{paths[0]} is another file than the one that was compared; reload to compare it")
        config = replace(config, models=copies)
        prove(config)
        runtimes = load(config)
        if home:
            keep(home, copies, runtimes[0].model.digest)
    return runtimes


def _load_served(roles: Roles, home: Path | None = None) -> list[Runtime]:
    return load_again(roles.served, home)


def load_first(roles: Roles, home: Path) -> list[Runtime]:
    """The model that served last, or where none has, the one in the files."""
    config = roles.served
    paths = config.model_paths
    if last := kept(home, paths):
        return load(replace(config, models=last))
    with _by_name(paths), copied(paths, home) as copies:
        runtimes = load(replace(config, models=copies))
        keep(home, copies, runtimes[0].model.digest)
    return runtimes


@contextmanager
def _by_name(paths: Sequence[Path]) -> Iterator[None]:
    """What is refused is said without the folders of `paths`."""
    try:
        yield
    except Refusal as refusal:
        said = str(refusal)
        for path in paths:
            said = said.replace(str(path), path.name)
        raise Refusal(said) from refusal


def _num_threads(config: "ServeConfig") -> int:
    """Of one model on the CPU."""
    if config.front_ends > 1:
        return config.model_threads or max(1, (num_cores() - config.front_ends) // max(1, len(config.devices)))
    return config.model_threads or max(1, num_cores() // config.workers)


def limits_of(config: "ServeConfig") -> Limits:
    """What was asked for, and what suits the machine, for each process that serves."""
    # One core has the event loop and the model.
    spare = num_cores() // max(config.workers, config.front_ends) - 1
    limits = Limits(
        max_body_bytes=int(config.max_body_mb * 1e6),
        max_held_bytes=int(config.max_held_mb * 1e6),
        max_decoded_bytes=int(config.max_decoded_mb * 1e6),
        max_images=config.max_images,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        max_connections=config.max_connections,
        deadline_s=config.deadline_ms / 1000,
        probe_every_s=config.probe_every,
        decode_threads=min(max(spare, 0), 4) if config.decode_threads is None else config.decode_threads,
    )
    return limits.of_each(config.front_ends)


def whole_app(
    config: "ServeConfig",
    runtimes: Sequence[Runtime] | Batcher,
    stream: logs.LogStream,
    *,
    load: Load,
    shadow: Shadow | None = None,
    tells_all: bool = False,
) -> FastAPI:
    """The app of one process, with what operators see of it. One that `tells_all` has a reload reach all processes."""
    observers = [logs.RequestLog(stream)] if logging.getLogger().isEnabledFor(logging.INFO) else []
    tracing = find_tracing()
    limits = limits_of(config)
    app = make_app(
        runtimes,
        replace(limits, max_connections=fit_to_files(limits.max_connections)),
        access=Access(read_api_key(config.api_key_file, os.environ), config.cors_origin),
        load=load,
        observers=[*observers, *([tracing] if tracing else [])],
        reload_everywhere=_tell_supervisor if tells_all else None,
        rpc=_rpc_address(config),
        shadow=shadow,
    )
    # What is there by now stays. Collections that walk through all of it hold up every hundredth answer for 30 ms.
    gc.collect()
    gc.freeze()
    return app


def _rpc_address(config: "ServeConfig") -> RpcAddress | None:
    if config.grpc_port is None:
        return None
    return RpcAddress(config.host, config.grpc_port, config.drain_seconds)


def _make_shadow(config: "ServeConfig", roles: Roles, home: Path | None = None) -> Shadow | None:
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


def _refuse_unfit_shadow(config: "ServeConfig") -> None:
    """Before workers start: what each of them would refuse later, and go on without."""
    if config.shadow:
        roles = Roles(config)
        with ShadowProcess(roles.served) as served, ShadowProcess(roles.shadow) as shadow:
            refuse_unfit(served.identity, shadow.identity)


def settings(config: "ServeConfig", app: FastAPI | partial[Any]) -> uvicorn.Config:
    """Of uvicorn's."""
    return uvicorn.Config(
        app,
        factory=isinstance(app, partial),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody's word for where a request comes from is needed, or taken
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=config.drain_seconds,
    )


def _make_worker(config: "ServeConfig", home: Path) -> FastAPI:
    with started(config) as stream:
        roles = Roles(config, home)
        runtimes, shadow = load_first(roles, home), _make_shadow(config, roles, home)
        again = partial(_load_served, roles, home)
        return whole_app(config, runtimes, stream, load=again, shadow=shadow, tells_all=True)


@contextmanager
def started(config: "ServeConfig") -> Iterator[logs.LogStream]:
    """In a process that a supervisor has started; what is refused ends it with one line."""
    stream = logs.configure(config.log_level)
    if supervisor := multiprocessing.parent_process():
        # one that is killed leaves no process behind that holds the port
        end_with_parent(signal.SIGTERM, supervisor.pid)
    try:
        yield stream
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


def end_with_parent(number: signal.Signals, parent: int | None) -> None:
    """The process `parent`, which started this one, sends it a signal when it ends, however it ends: on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it has ended before it was asked
        os.kill(os.getpid(), number)


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
