"""One request, top to bottom: bytes → decode → batch → run → answer."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from common.refusal import Refusal
from export.runtimes.runtime import Runtime
from serve.decode.decode import warm_up_decoders
from serve.model.check import Load, Reloader, warm_up
from serve.model.prober import Prober
from serve.processes.signals import heed_signals
from serve.request import problems
from serve.request.access import EVERYBODY, Access
from serve.request.answer import ModelName, Prediction
from serve.request.batcher import Batcher, Served
from serve.request.body import REQUEST_BODY
from serve.request.limits import Limits
from serve.request.open_connections import Door
from serve.request.predict import TOP_K, Hot, Observer
from serve.request.problems import Problem
from serve.shadow.shadow import Shadow
from serve.v2.routes import make_router, refuse_unready
from serve.v2.rpc.port import RpcAddress
from serve.watching.metrics import MEDIA_TYPE, Metrics, watch_probes


class _App(FastAPI):
    """FastAPI behind `front`: a prediction passes none of its middleware, which would take an eighth of its time."""

    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.front if scope["type"] == "http" else self.routed)(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """Without Starlette's outermost one, whose answer to an exception is no problem document: `front` has one."""
        outermost = super().build_middleware_stack()
        assert isinstance(outermost, ServerErrorMiddleware)
        return outermost.app

    async def routed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """FastAPI as it comes."""
        await super().__call__(scope, receive, send)


def make_app(
    runtime: Runtime | Sequence[Runtime] | Batcher,
    limits: Limits,
    *,
    access: Access = EVERYBODY,
    load: Load | None = None,
    observers: Sequence[Observer] = (),
    reload_everywhere: Callable[[], None] | None = None,
    rpc: RpcAddress | None = None,
    shadow: Shadow | None = None,
) -> FastAPI:
    """The whole server around one loaded model, in one runtime or one for each device, or in a batcher.

    It is ready once its lifespan has warmed the model up. `load` makes the runtimes anew, on SIGHUP and, where there
    is a key, on POST /admin/reload, which then calls `reload_everywhere`. `observers` learn of every finished request.
    `rpc` is where gRPC is served beside HTTP.
    `shadow` answers a share of the images too, and POST /admin/promote makes it the model.
    """
    batcher = runtime if isinstance(runtime, Batcher) else Batcher(_served(runtime), limits)
    batcher.shadow = shadow
    door = Door(limits.max_connections)
    metrics = Metrics(batcher, door)
    prober = Prober(batcher, every_s=limits.probe_every_s, deadline_s=limits.deadline_s)
    watch_probes(metrics, prober)
    batcher.find_fault = lambda: prober.fault
    reloader = Reloader(batcher, load, max_batch=limits.max_batch) if load else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Door]]:
        await asyncio.to_thread(_warm_up, batcher.served, limits.max_batch)
        batcher.start()
        if rpc:
            from serve.v2.rpc.server import RpcServer  # an extra, and a tenth of a second

            app.state.rpc = RpcServer(app, hot, batcher, limits, access)
            await app.state.rpc.start(rpc)
        if shadow:
            shadow.start(lambda: batcher.served.model)
        app.state.is_ready = True
        probing = asyncio.create_task(prober.run(), name="probing") if prober.every_s else None
        with heed_signals(before_stop=no_longer_ready, reload=reloader.reload if reloader else None):
            yield {"door": door}  # to every connection
        no_longer_ready()
        if probing:
            probing.cancel()
        if app.state.rpc:
            await app.state.rpc.stop()
        await batcher.close()
        if shadow:
            shadow.close()

    def no_longer_ready() -> None:
        app.state.is_ready = False
        if app.state.rpc:
            app.state.rpc.begin_stop()

    app = _App(
        title="DiracNet",
        version="1",
        description="Classifies images. Every refusal is an RFC 9457 problem document.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lead to whatever host the client names
        lifespan=lifespan,
        exception_handlers=problems.exception_handlers(),
    )
    app.front = hot = Hot(app.routed, batcher=batcher, limits=limits, access=access, observers=(metrics, *observers))
    if access.cors_origins:
        app.front = cors = CORSMiddleware(
            app.front,
            allow_origins=access.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type", "X-Api-Key", "X-Request-Id"),
            expose_headers=("Retry-After", "Server-Timing", "X-Request-Id"),
        )
        cors.preflight_headers["X-Content-Type-Options"] = "nosniff"  # the one answer that `Hot` never sees
    app.state.is_ready, app.state.rpc, app.state.prober = False, None, prober
    _add_predict(app)
    _add_operation(app, batcher, metrics, prober)
    app.include_router(make_router(batcher, limits))
    if access.api_key and reloader:
        _add_admin(app, reloader, reload_everywhere)
    _add_pages(app)
    return app


def _served(runtime: Runtime | Sequence[Runtime]) -> Served:
    return Served(tuple(runtime) if isinstance(runtime, Sequence) else (runtime,))


def _warm_up(served: Served, max_batch: int) -> None:
    for runtime in served.runtimes:
        warm_up(runtime, max_batch)
    warm_up_decoders(served.model.spec.image)


def _add_predict(app: FastAPI) -> None:
    @app.post(
        "/predict", responses=problems.documented(*problems.OF_PREDICTION), openapi_extra={"requestBody": REQUEST_BODY}
    )
    async def predict(
        top_k: Annotated[int, Query(ge=1, description="classes per image; above the model's number: all")] = TOP_K,
    ) -> Prediction:
        """Classify one image or many."""
        raise AssertionError("serve/request/predict.py answers it; what stands here describes it")


def _add_operation(app: FastAPI, batcher: Batcher, metrics: Metrics, prober: Prober) -> None:
    @app.get("/model", responses=problems.documented(problems.UNAUTHORIZED))
    async def card() -> dict[str, Any]:
        """What the model says of itself, what it answered, and what its shadow did."""
        runtime, shadow = batcher.served.runtimes[0], batcher.shadow
        watched = {**batcher.watch.card(runtime.model), "shadow": shadow and shadow.card(), "probe": prober.card()}
        return {**model_card(runtime), **watched}

    @app.get("/metrics", response_class=PlainTextResponse, responses=problems.documented(problems.UNAUTHORIZED))
    async def show_metrics() -> Response:
        """Requests, latencies, batches, queue, model and memory for Prometheus."""
        return Response(metrics.render(), headers={"Content-Type": MEDIA_TYPE})

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses=problems.documented(problems.NOT_READY))
    async def readyz(request: Request) -> dict[str, str]:
        """The model runs at every batch size and answers as its file says, images are decoded, nothing stops."""
        refuse_unready(request.app.state.is_ready, batcher)
        return {"status": "ready"}


def _add_admin(app: FastAPI, reloader: Reloader, reload_everywhere: Callable[[], None] | None) -> None:
    async def take(swap: Callable[[], Awaitable[Served]]) -> ModelName:
        try:
            served = await swap()
        except Refusal as refusal:
            raise Problem(problems.BAD_MODEL, str(refusal)) from refusal
        if reload_everywhere:
            reload_everywhere()
        return served.name

    @app.post("/admin/reload", responses=problems.documented(problems.UNAUTHORIZED, problems.BAD_MODEL))
    async def reload() -> ModelName:
        """Read the model's file again; the old model goes on if the new one is bad."""
        return await take(reloader.reload)

    refusals = problems.documented(problems.UNAUTHORIZED, problems.BAD_MODEL, problems.NOT_COMPARED)

    @app.post("/admin/promote", responses=refusals)
    async def promote() -> ModelName:
        """Serve the shadow, once it was compared on enough images; the model that served becomes the shadow."""
        return await take(reloader.promote)


def _add_pages(app: FastAPI) -> None:
    page, docs = (_read_page(name) for name in ("page.html", "docs.html"))

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers(page))

    @app.get("/docs", include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        return HTMLResponse(docs, headers=page_headers(docs))


def page_headers(page: str) -> dict[str, str]:
    """A browser runs the scripts and styles that stand in `page` and no others, and asks no other host for anything."""
    hashes = {
        tag: " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        for tag in ("script", "style")
    }
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    }


def _digest(text: str) -> str:
    return base64.b64encode(sha256(text.encode()).digest()).decode()


def model_card(runtime: Runtime) -> dict[str, Any]:
    """Name, digest, architecture, input and labels of the model, and how it came to be.

    Of somebody else's: how it is read, in place of its architecture, and who says so. Of a net that its user made:
    its name; the provenance says from what, and what the fold did.
    """
    model, spec = runtime.model, runtime.model.spec
    image = spec.image
    ours = {
        "family": spec.family,
        "depth": spec.depth,
        "width": spec.width,
        "nonlinearity": spec.nonlinearity,
        "parameterization": spec.parameterization,
    }
    return {
        "name": model.name,
        "digest": model.digest,
        "file_bytes": model.num_bytes,
        "runtime": runtime.description,
        **({"reading": asdict(model.reading)} if model.reading else {"net": spec.net} if spec.net else ours),
        "input": {
            "height": image.height,
            "width": image.width,
            "channels": image.channels,
            "resize": image.resize,
        },
        "labels": list(spec.labels),
        "temperature": spec.temperature,
        "provenance": model.provenance,
    }


def _read_page(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
