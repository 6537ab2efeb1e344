from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from rpc_calls import Raw

from serve.request.app import make_app
from serve.request.limits import Limits

LIMITS = Limits()


@pytest.fixture
def serve_rpc(live):
    """`with serve_rpc(runtime, limits) as served`: a real server of HTTP and gRPC, its `url`, `target` and `visits`."""

    @contextmanager
    def serve_rpc(runtime, limits=LIMITS, *, drain_s=30.0, loop="uvloop", **options):
        visits = SimpleQueue()
        limits = replace(limits, drain_s=drain_s)
        app = make_app(runtime, limits, grpc_address="127.0.0.1:0", observers=[visits.put], **options)
        with live(app, loop=loop) as url:
            target = f"127.0.0.1:{app.grpc.port}"
            raw = Raw(target)
            yield SimpleNamespace(app=app, url=url, target=target, visits=visits, raw=raw)
            raw.channel.close()

    return serve_rpc


@pytest.fixture
def served_rpc(serve_rpc, runtime):
    with serve_rpc(runtime, Limits(max_body_bytes=200_000, max_images=40, max_pixels=1_000_000)) as served:
        yield served
