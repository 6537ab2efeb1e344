"""Several processes that accept, decode and answer, and one for each device, which runs the model for its share."""

import gc
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from export.runtimes.runtime import Runtime
from serve.decode.turns import HostBudget
from serve.front_ends.batcher import FrontBatcher
from serve.front_ends.device import Device, DeviceWorker
from serve.front_ends.link import Dial
from serve.model.check import warm_up
from serve.processes import serving
from serve.processes.supervisor import Role, Supervisor, Worker
from serve.request.batcher import Served
from serve.shadow.roles import Roles
from serve.watching import logs
from serve.watching.metrics import Computed

if TYPE_CHECKING:
    from serve.config import ServeConfig

LoadFirst = Callable[[Roles, Path], Sequence[Runtime]]


def run(
    config: "ServeConfig",
    listener: socket.socket,
    url: str,
    *,
    load: LoadFirst = serving.load_first,
) -> int:
    """Serve on `listener` until a signal ends it; the exit status.

    `load` is how a device process loads its model first; it travels there by its name.
    """
    logs.configure(config.log_level)
    serving.limits_of(config)  # what is refused is refused before anything is measured
    config, reason = serving.decide(config)
    doors = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(config.front_ends)]
    devices = [(device,) for device in config.devices] or [()]
    with serving.folders() as home, ExitStack() as open_doors:
        for door in chain.from_iterable(doors):
            open_doors.enter_context(door)
        budget = home.with_name("decoders")
        budget.touch()
        fronts, models = [], []
        for outside, _ in doors:
            settings = serving.settings(config, partial(_make_front_end, config, outside, budget))
            fronts.append(partial(Worker, settings, [listener]))
        for index, device in enumerate(devices):
            settings = serving.settings(config, partial(_make_device, replace(config, devices=device), home, load))
            models.append(partial(DeviceWorker, settings, [inside for _, inside in doors[index :: len(devices)]]))
        what = f"{len(fronts)} front ends, {len(models)} device process{'es' if len(models) > 1 else ''}"
        was_told = Supervisor(
            Role("front end", fronts),
            Role("device process", models),
            drain_s=config.drain_seconds,
            say_ready=partial(serving.say_ready, what, reason, url),
        ).run()
    return 0 if was_told else 2


def _make_front_end(config: "ServeConfig", door: socket.socket, budget: Path) -> FastAPI:
    with serving.started(config) as stream:
        limits = serving.limits_of(config)
        batcher = FrontBatcher(Dial(door, limits), limits, HostBudget(budget, limits.heavy_bytes))
        return serving.whole_app(config, batcher, stream, load=batcher.reload, tells_all=len(config.devices) > 1)


def _make_device(config: "ServeConfig", home: Path, load: LoadFirst, doors: Sequence[socket.socket]) -> Device:
    with serving.started(config):
        limits = serving.limits_of(config)
        served = Served(tuple(load(Roles(config, home), home)))
        for runtime in served.runtimes:
            warm_up(runtime, limits.max_batch)
        device = Device(served, doors, limits, load=partial(serving.load_again, config, home))
        computed = Computed(CollectorRegistry())
        device.observe_batch, device.observe_run = computed.observe_batch, computed.observe_run
        gc.collect()
        gc.freeze()
        return device
