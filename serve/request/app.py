"""The app around a loaded model: its parts, its lifespan, and every route but `POST /predict` (predict.py)."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from common.refusal import Refusal
from export.runtimes.runtime import Runtime
from serve.decode.pool import warm_up_decoders
from serve.model.check import LoadModel, Reloader, warm_up
from serve.model.prober import Prober
from serve.processes.signals import heed_signals
from serve.request import problems
from serve.request.access import EVERYBODY, Access
from serve.request.batcher import Batcher
from serve.request.body import REQUEST_BODY
from serve.request.connection import Door
from serve.request.job import ModelName, Prediction, Served
from serve.request.limits import Limits
from serve.request.predict import TOP_K, Observer, RequestHandler
from serve.request.problems import Problem
from serve.shadow.shadow import Shadow
from serve.v2.routes import make_router
from serve.watching.metrics import MEDIA_TYPE, Metrics, watch_probes

if TYPE_CHECKING:
    from serve.v2.grpc_server import GrpcServer


class App(FastAPI):
    """FastAPI behind `front`, and the parts of the server that start and stop with it.

    FastAPI's middleware would take an eighth of a prediction's time.
    """

    front: ASGIApp  # marks each request with a visit
    metrics: Metrics
    grpc: "GrpcServer | None" = None

    def __init__(self, batcher: Batcher, prober: Prober, door: Door, reloader: Reloader | None, max_batch: int) -> None:
        self._batcher, self.prober, self._door = batcher, prober, door
        self._reloader, self._max_batch = reloader, max_batch
        super().__init__(
            title="DiracNet",
            version="1",
            description="Classifies images. Every refusal is an RFC 9457 problem document.",
            openapi_url=None,  # FastAPI would write the whole document again for each request, in the event loop
            redirect_slashes=False,  # a redirect would go to the host that the client names
            lifespan=App._run,
            exception_handlers={HTTPException: problems.refuse_unrouted},  # `front` answers all problems
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.front if scope["type"] == "http" and "visit" not in scope else super().__call__
        await answer(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """Without ServerErrorMiddleware, whose answer is not a problem document: `front` handles exceptions."""
        outermost = super().build_middleware_stack()
        assert isinstance(outermost, ServerErrorMiddleware)
        return outermost.app

    def openapi(self) -> dict[str, Any]:
        """Without the 422 that FastAPI adds to parameters: any text is a name in an address."""
        document = super().openapi()
        for responses in (operation["responses"] for path in document["paths"].values() for operation in path.values()):
            if "application/json" in responses.get("422", {}).get("content", ()):
                del responses["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[dict[str, Door]]:
        batcher, shadow = self._batcher, self._batcher.shadow
        await asyncio.to_thread(_warm_up, batcher.served, self._max_batch)
        batcher.start()
        if self.grpc:
            await self.grpc.start()
        if shadow:
            shadow.start(lambda: batcher.served.model)
        batcher.is_ready = True
        probing = asyncio.create_task(self.prober.run(), name="probing") if self.prober.every_s else None
        with heed_signals(before_stop=self._refuse_new, reload=self._reloader and self._reloader.reload):
            yield {"door": self._door}  # to every connection
        self._refuse_new()
        if probing:
            probing.cancel()
        if self.grpc:
            await self.grpc.stop()
        await batcher.close()
        if shadow:
            shadow.close()

    def _refuse_new(self) -> None:
        self._batcher.is_ready = False
        if self.grpc:
            self.grpc.begin_stop()


def make_app(
    runtime: Runtime | Sequence[Runtime] | Batcher,
    limits: Limits,
    *,
    access: Access = EVERYBODY,
    load: LoadModel | None = None,
    observers: Sequence[Observer] = (),
    reload_everywhere: Callable[[], None] | None = None,
    grpc_address: str | None = None,
    shadow: Shadow | None = None,
) -> App:
    """The server around one loaded model: one runtime, one for each device, or a batcher.

    It is ready once its lifespan has warmed the model up. `load` loads the model again, on SIGHUP and, if there is a
    key, on POST /admin/reload, which then calls `reload_everywhere`. `observers` are called with every finished
    request. `grpc_address` is where gRPC is served too. `shadow` answers a share of the images too, and POST
    /admin/promote makes it the model.
    """
    batcher = _batcher_of(runtime, limits)
    batcher.shadow = shadow
    prober = Prober(batcher, every_s=limits.probe_every_s, deadline_s=limits.deadline_s)
    batcher.find_fault = lambda: prober.fault
    door = Door(limits.max_connections)
    reloader = Reloader(batcher, load, max_batch=limits.max_batch) if load else None

    app = App(batcher, prober, door, reloader, limits.max_batch)
    app.metrics = metrics = Metrics(batcher, door)
    watch_probes(metrics, prober)
    handler = RequestHandler(app, batcher=batcher, limits=limits, access=access, observers=(metrics, *observers))
    app.front = _allow_origins(handler, access.cors_origins)
    if grpc_address:
        from serve.v2.grpc_server import GrpcServer  # an extra, which takes a tenth of a second to import

        app.grpc = GrpcServer(grpc_address, app, handler, batcher, limits, access)
    _add_operation(app, batcher, metrics, prober)
    app.include_router(make_router(batcher, limits))
    if access.api_key and reloader:
        _add_admin(app, reloader, reload_everywhere)
    _add_fixed(app, "/", lambda: _page("page.html"))
    _add_fixed(app, "/docs", lambda: _page("docs.html"))
    _add_fixed(app, "/openapi.json", lambda: JSONResponse(app.openapi()))
    return app


def _batcher_of(runtime: Runtime | Sequence[Runtime] | Batcher, limits: Limits) -> Batcher:
    if isinstance(runtime, Batcher):
        return runtime
    return Batcher(Served(tuple(runtime) if isinstance(runtime, Sequence) else (runtime,)), limits)


def _allow_origins(handler: RequestHandler, origins: Sequence[str]) -> ASGIApp:
    """`handler` for web pages of other origins too."""
    if not origins:
        return handler
    cors = CORSMiddleware(
        handler,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("Authorization", "Content-Type", "X-Api-Key", "X-Request-Id"),
        expose_headers=("Retry-After", "Server-Timing", "X-Request-Id"),
    )
    cors.preflight_headers["X-Content-Type-Options"] = "nosniff"  # the only answer that `handler` does not send
    return cors


def _warm_up(served: Served, max_batch: int) -> None:
    """Not in the lifespan itself, whose variables would keep a model that is replaced."""
    warm_up(served.runtimes, max_batch)
    warm_up_decoders(served.model.spec.image)


def _add_operation(app: FastAPI, batcher: Batcher, metrics: Metrics, prober: Prober) -> None:
    with_key = problems.documented(problems.UNAUTHORIZED)

    @app.post(  # only for OpenAPI: `RequestHandler` answers the request before it is routed
        "/predict", responses=problems.documented(*problems.OF_PREDICTION), openapi_extra={"requestBody": REQUEST_BODY}
    )
    async def predict(
        top_k: Annotated[int, Query(ge=1, description="classes per image; above the model's number: all")] = TOP_K,
    ) -> Prediction:
        """Classify one image or many."""
        ...

    @app.get("/model", responses=with_key)
    async def card() -> dict[str, Any]:
        """The model's description, and statistics of its answers, its shadow and its probes."""
        runtime, shadow = batcher.served.runtimes[0], batcher.shadow
        watched = {"shadow": shadow and shadow.summary(), "probe": prober.summary()}
        return {**model_card(runtime), **batcher.watch.summary(runtime.model), **watched}

    @app.get("/metrics", response_class=PlainTextResponse, responses=with_key)
    async def show_metrics() -> Response:
        """Requests, latencies, batches, queue, model and memory for Prometheus."""
        return Response(metrics.render(), headers={"Content-Type": MEDIA_TYPE})

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses=problems.documented(problems.NOT_READY))
    async def readyz() -> dict[str, str]:
        """The model has run at every batch size and answers as its file says, and images are decoded."""
        batcher.check_ready()
        return {"status": "ready"}


def _add_admin(app: FastAPI, reloader: Reloader, reload_everywhere: Callable[[], None] | None) -> None:
    refusals = (problems.UNAUTHORIZED, problems.BAD_MODEL)

    async def swap(load: Callable[[], Awaitable[Served]]) -> ModelName:
        try:
            served = await load()
        except Refusal as refusal:
            raise Problem(problems.BAD_MODEL, str(refusal)) from refusal
        if reload_everywhere:
            reload_everywhere()
        return served.name

    @app.post("/admin/reload", responses=problems.documented(*refusals))
    async def reload() -> ModelName:
        """Read the model's file again; the old model keeps serving if the new one is bad."""
        return await swap(reloader.reload)

    @app.post("/admin/promote", responses=problems.documented(*refusals, problems.NOT_COMPARED))
    async def promote() -> ModelName:
        """Serve the shadow, once it was compared on enough images; the model that served becomes the shadow."""
        return await swap(reloader.promote)


def _add_fixed(app: FastAPI, path: str, make: Callable[[], Response]) -> None:
    """An answer that is always the same, made when it is first asked for."""
    answer = cache(make)

    @app.get(path, include_in_schema=False)
    async def show() -> Response:
        return answer()


def _page(file: str) -> HTMLResponse:
    """A page whose policy allows its own scripts and styles, and requests to this server alone."""
    page = Path(__file__).with_name(file).read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hashes(page, 'script')}; style-src {_hashes(page, 'style')}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(page, headers={"Content-Security-Policy": policy})


def _hashes(page: str, tag: str) -> str:
    """Of all elements `tag` of a page, as a Content-Security-Policy lists them."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts)


def model_card(runtime: Runtime) -> dict[str, Any]:
    """Name, digest, architecture, input, labels and provenance of the model.

    In place of the architecture: for a file that is not of this project, how it is read and who says so; for a net
    that its user made, its name.
    """
    model, spec = runtime.model, runtime.model.spec
    if model.reading:
        architecture: dict[str, Any] = {"reading": asdict(model.reading)}
    elif spec.net:
        architecture = {"net": spec.net}
    else:
        fields = ("family", "depth", "width", "nonlinearity", "parameterization")
        architecture = {name: getattr(spec, name) for name in fields}
    return {
        "name": model.name,
        "digest": model.digest,
        "file_bytes": model.num_bytes,
        "runtime": runtime.description,
        **architecture,
        "input": {name: getattr(spec.image, name) for name in ("height", "width", "channels", "resize")},
        "labels": list(spec.labels),
        "temperature": spec.temperature,
        "provenance": model.provenance,
    }
