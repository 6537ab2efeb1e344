"""One request, top to bottom: bytes → decode → batch → run → answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse

from export.runtimes.runtime import Runtime
from serve import problems
from serve.answer import Prediction
from serve.batcher import Batcher, Served
from serve.hot import TOP_K, Hot
from serve.limits import Limits
from serve.problems import Problem
from serve.v2 import make_router
from serve.wire import REQUEST_BODY

# A browser that shows a page of ours asks no other host for anything, whatever the page holds.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_PREDICT_PROBLEMS = problems.documented(
    problems.BAD_REQUEST,
    problems.TOO_LARGE,
    problems.TOO_MANY_IMAGES,
    problems.TOO_MANY_PIXELS,
    problems.MEDIA_TYPE_UNKNOWN,
    problems.UNDECODABLE,
    problems.INTERNAL,
    problems.NOT_A_NUMBER,
)


def make_app(runtime: Runtime, limits: Limits) -> FastAPI:
    """The whole server around one loaded model. It is ready once its lifespan has warmed the model up."""
    batcher = Batcher(Served((runtime,)), limits)
    model = runtime.model

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(warm_up, runtime)
        batcher.start()
        app.state.is_ready = True
        yield
        app.state.is_ready = False
        await batcher.close(timeout_s=10)

    app = FastAPI(
        title=model.name,
        version=model.digest[:12],
        description="Classifies images. Every refusal is an RFC 9457 problem document.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers=problems.exception_handlers(),
    )
    app.add_middleware(Hot, batcher=batcher, limits=limits)
    app.state.is_ready = False

    @app.post("/predict", responses=_PREDICT_PROBLEMS, openapi_extra={"requestBody": REQUEST_BODY})
    async def predict(
        top_k: Annotated[int, Query(ge=1, description="classes per image; above the model's number: all")] = TOP_K,
    ) -> Prediction:
        """Classify one image or many."""
        raise AssertionError("serve/hot.py answers it; what stands here describes it")

    @app.get("/model")
    async def card() -> dict[str, Any]:
        """What the model says of itself."""
        return model_card(runtime)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses=problems.documented(problems.NOT_READY))
    async def readyz(request: Request) -> dict[str, str]:
        """The model has run once and predictions are quick."""
        if not request.app.state.is_ready:
            raise Problem(problems.NOT_READY, "the model has not run yet; ask again in a moment")
        return {"status": "ready"}

    app.include_router(make_router(batcher, limits))

    page, docs = (_read_page(name) for name in ("page.html", "docs.html"))

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        return HTMLResponse(docs, headers=_PAGE_HEADERS)

    return app


def warm_up(runtime: Runtime) -> None:
    """Run the model once on a black image: first calls allocate and choose kernels."""
    image = runtime.model.spec.image
    runtime(np.zeros((1, image.height, image.width, image.channels), np.uint8))


def model_card(runtime: Runtime) -> dict[str, Any]:
    """Name, digest, architecture, input and labels of the model, and how it came to be."""
    model, spec = runtime.model, runtime.model.spec
    image = spec.image
    return {
        "name": model.name,
        "digest": model.digest,
        "runtime": runtime.description,
        "family": spec.family,
        "depth": spec.depth,
        "width": spec.width,
        "nonlinearity": spec.nonlinearity,
        "parameterization": spec.parameterization,
        "input": {"height": image.height, "width": image.width, "channels": image.channels},
        "labels": list(spec.labels),
        "provenance": model.provenance,
    }


def _read_page(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
