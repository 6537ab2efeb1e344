"""Several front ends, which accept, decode and answer, and one process for each device, which runs the model."""

import gc
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from export.runtimes.runtime import Runtime
from serve.config import ServeConfig
from serve.decode.budget import HostBudget
from serve.front_ends.batcher import FrontBatcher
from serve.front_ends.device import Device, DeviceServer
from serve.front_ends.link import Dialer
from serve.model.check import warm_up
from serve.model.load import Roles, load_again, load_first
from serve.processes import serving
from serve.processes.supervisor import Role, Worker
from serve.request.job import Served
from serve.watching.metrics import Computed

LoadFirst = Callable[[Roles, Path], Sequence[Runtime]]


def run(config: ServeConfig, listener: socket.socket, url: str, *, load: LoadFirst = load_first) -> int:
    """Serve on `listener` until a signal; the exit status.

    `load` is how a device process loads its model first; it is pickled by name.
    """
    config, reason, _ = serving.begin(config)
    doors = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(config.front_ends)]
    devices = [(device,) for device in config.devices] or [()]
    with serving.folders() as home, ExitStack() as open_doors:
        for door in chain.from_iterable(doors):
            open_doors.enter_context(door)
        budget = home.with_name("decoders")
        budget.touch()
        fronts, models = [], []
        for outside, _ in doors:
            settings = serving.uvicorn_config(config, partial(_make_front_end, config, outside, budget))
            fronts.append(partial(Worker, settings, [listener]))
        for index, device in enumerate(devices):
            make = partial(_make_device, replace(config, devices=device), home, load)
            sockets = [inside for _, inside in doors[index :: len(devices)]]
            models.append(partial(Worker, serving.uvicorn_config(config, make), sockets, DeviceServer))
        what = f"{len(fronts)} front ends, {len(models)} device process{'es' if len(models) > 1 else ''}"
        return serving.supervise(
            config, Role("front end", fronts), Role("device process", models), text=serving.greeting(what, reason, url)
        )


def _make_front_end(config: ServeConfig, door: socket.socket, budget: Path) -> FastAPI:
    with serving.started(config) as stream:
        limits = serving.limits_of(config)
        batcher = FrontBatcher(Dialer(door, limits), limits, HostBudget(budget, limits.heavy_bytes))
        tell = serving.tell_supervisor if len(config.devices) > 1 else None
        return serving.whole_app(config, batcher, stream, load=batcher.reload, reload_everywhere=tell)


def _make_device(config: ServeConfig, home: Path, load: LoadFirst, doors: Sequence[socket.socket]) -> Device:
    with serving.started(config):
        limits = serving.limits_of(config)
        served = Served(tuple(load(Roles(config, home), home)))
        for runtime in served.runtimes:
            warm_up(runtime, limits.max_batch)
        device = Device(served, doors, limits, load=partial(load_again, config, home))
        computed = Computed(CollectorRegistry())
        device.observe_batch, device.observe_run = computed.observe_batch, computed.observe_run
        gc.collect()
        gc.freeze()
        return device
