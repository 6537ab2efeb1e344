"""Serve one model with replicas on many machines, through Ray Serve: `python serve/cluster.py plain.onnx`."""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import POSITIONAL, run_command
from common.documents import wrong_fields
from common.files import read_whole, write_whole
from common.refusal import Refusal

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from serve.request.access import Access

ROOT = Path(__file__).resolve().parents[1]
APPLICATION = "diracnet"
EXAMPLES = (
    "python serve/cluster.py plain.onnx                              # a cluster of this machine alone",
    "python serve/cluster.py plain.onnx --config deploy/cluster.toml",
    "DIRACNET_API_KEY=... python serve/cluster.py plain.onnx         # clients must send this key",
    'ray start --head; python serve/cluster.py plain.onnx --config cluster.toml     # with cluster.address = "auto"',
)


@dataclass(frozen=True)
class ClusterConfig:
    model: Annotated[Path | None, "plain.onnx or plain.engine (default: models/fashion-mnist.onnx)", POSITIONAL] = None
    config: Annotated[Path | None, "TOML file like deploy/cluster.toml (default: its values)"] = None


@dataclass(frozen=True)
class Cluster:
    """Where Ray is: "local" starts it here, "auto" joins the one on this machine, HOST:PORT any other."""

    address: str = "local"


@dataclass(frozen=True)
class Http:
    """The proxies that take requests: one on every machine, or only on the first."""

    host: str = "127.0.0.1"
    port: int = 8000
    on_every_machine: bool = False


@dataclass(frozen=True)
class Replicas:
    """How many copies of the server run, and the resources of each."""

    fewest: int = 1
    most: int = 4
    requests_each: int = 32  # at once in one replica; more start another replica
    requests_most: int = 128  # that one replica accepts; more wait in the proxy
    grow_after_s: float = 5.0
    shrink_after_s: float = 120.0
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most:
            raise Refusal(f"replicas: fewest must be from 1 to most, got {self.fewest} and {self.most}")


@dataclass(frozen=True)
class Settings:
    """A TOML file: one table for each field, every key optional."""

    cluster: Cluster = field(default_factory=Cluster)
    http: Http = field(default_factory=Http)
    replicas: Replicas = field(default_factory=Replicas)


def command(config: ClusterConfig) -> int:
    """Serve a model over HTTP with replicas that Ray Serve starts, watches and replaces, until Ctrl-C."""
    from serve.config import BUNDLED
    from serve.request.access import Access, read_api_key
    from serve.run import listen

    settings, access = read_settings(config.config), Access(read_api_key(None, os.environ))
    http = settings.http
    files = read_artefact(config.model or BUNDLED)
    if settings.cluster.address == "local":
        listen(http.host, http.port).close()  # refuses a taken port now; the proxies would try for a minute
    serve, ray = start_ray(settings.cluster)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        location = "EveryNode" if http.on_every_machine else "HeadOnly"
        serve.start(proxy_location=location, http_options={"host": http.host, "port": http.port})
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.run(application(files, settings.replicas, access), name=APPLICATION, logging_config=quiet)
        print(f"serving at http://{http.host}:{http.port}, machines: {len(ray.nodes())}  (Ctrl-C stops)", flush=True)
        stop.wait()
        serve.shutdown()
    finally:
        ray.shutdown()
    print("stopped", flush=True)
    return 0


def read_settings(path: Path | None) -> Settings:
    """The settings of a TOML file; one refusal lists all unknown tables and keys and wrong types."""
    if path is None:
        return Settings()
    try:
        document = tomllib.loads(read_whole(path).decode())
    except ValueError as error:
        raise Refusal(f"{path} is not valid TOML: {error}") from error
    kinds = get_type_hints(Settings)
    wrong = [f"there is no table [{name}]" for name in document.keys() - kinds.keys()]
    for name, kind in kinds.items():
        wrong += _faults(name, document.get(name, {}), get_type_hints(kind))
    if wrong:
        raise Refusal(f"{path}: {'; '.join(sorted(wrong))} (see deploy/cluster.toml)")
    return Settings(**{name: kind(**document.get(name, {})) for name, kind in kinds.items()})


def _faults(name: str, table: Any, kinds: dict[str, type]) -> list[str]:
    if not isinstance(table, dict):
        return [f"{name} must be a table"]
    unknown = table.keys() - kinds.keys()
    faults = wrong_fields({key: value for key, value in table.items() if key not in unknown}, kinds)
    return [f"[{name}] has no {key}" for key in unknown] + [f"[{name}] {fault}" for fault in faults]


def read_artefact(path: Path) -> dict[str, bytes]:
    """The files of a model by path in its folder. They travel to the replicas, so that machines need no shared disk."""
    from export.model_file.engine_card import read_card
    from export.runtimes.load import load_runtime
    from serve.model.check import check
    from serve.model.copies import files_of

    if path.suffix == ".engine":  # can be loaded only where the replicas run
        read_card(path)
    else:
        check(load_runtime(path))
    return {str(file.relative_to(path.parent)): read_whole(file) for file in files_of(path)}


def start_ray(cluster: Cluster) -> tuple[Any, Any]:
    """Join or start a cluster; the modules `ray.serve` and `ray`."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reads it when it is imported
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise Refusal("Ray is not installed here: pip install -e '.[cluster]'") from error
    absent = Refusal(
        f"no Ray cluster at {cluster.address!r}: start one with ray start --head, or leave [cluster] address out"
    )
    host, _, port = cluster.address.rpartition(":")
    try:
        if host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise absent from error
    code = [str(ROOT / stage) for stage in ("common", "train", "export", "serve")]
    try:
        ray.init(
            address=cluster.address,
            namespace="serve",
            runtime_env={"py_modules": code},
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        raise absent from error
    return serve, ray


def application(files: dict[str, bytes], replicas: Replicas, access: "Access") -> "Application":
    """The app of `serve/request/app.py` as a deployment; each replica writes the files to a folder of its own."""
    from ray import serve

    from serve.request.limits import Limits

    def build() -> "FastAPI":  # travels to the replicas by value, with `files`
        from export.runtimes.load import load_runtime
        from serve.model.check import check
        from serve.request.app import make_app

        with tempfile.TemporaryDirectory(prefix="diracnet-") as folder:
            for name, content in files.items():
                write_whole(Path(folder, name), content)
            runtime = load_runtime(Path(folder, next(iter(files))), num_threads=max(1, int(replicas.cpus)))
        check(runtime)
        return make_app(runtime, Limits(), access=access)

    deployment = serve.deployment(
        name="serve",
        max_ongoing_requests=replicas.requests_most,
        graceful_shutdown_timeout_s=Limits().deadline_s,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        autoscaling_config={
            "min_replicas": replicas.fewest,
            "max_replicas": replicas.most,
            "target_ongoing_requests": replicas.requests_each,
            "upscale_delay_s": replicas.grow_after_s,
            "downscale_delay_s": replicas.shrink_after_s,
        },
    )
    return deployment(serve.ingress(build)()).bind()


if __name__ == "__main__":
    sys.exit(run_command(command, ClusterConfig, examples=EXAMPLES))
