"""The web application: routes, middleware, lifespan."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from server import faults
from server.description import DescribedAPI
from server.engine.async_engine import AsyncEngine
from server.engine.loading import Report
from server.gate import Gate
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.openai import chat, completions, models, tokenization
from server.openai.errors import add_error_handlers
from server.openai.service import Service
from server.settings import Settings

if TYPE_CHECKING:
    from server.engine.engine import Engine

operations = APIRouter()


class Status(BaseModel):
    """What a probe tells. ``percent``: an estimate of the part of ``phase`` that is done; fields that say nothing are left out."""

    status: Literal["ok", "loading", "draining", "failed"]
    phase: str | None = None
    percent: int | None = None
    open_requests: int | None = None


def create_app(load: Callable[[Report], "Engine"], settings: Settings) -> FastAPI:
    """The application: its lifespan calls ``load`` in a thread, then serves the engine that comes of it. ``state.life``: how far it is."""
    metrics = Metrics(settings.model_name)

    def load_service(report: Report) -> Service:
        service = _service(load(report), metrics, settings)
        if settings.faults:
            faults.install(faults.parse(settings.faults), service)
        return service

    life = Lifecycle(load_service, settings.drain_timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        life.start()
        yield
        await life.end()

    app = DescribedAPI(
        needs_key=bool(settings.api_keys),
        title="vsd-serve",
        version=_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.life, app.state.metrics = life, metrics
    app.add_middleware(Gate, api_keys=settings.api_keys, life=life)
    if settings.cors_origins:
        # Outside the gate: browsers ask for permission without the key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    add_error_handlers(app)
    for router in (completions.router, chat.router, models.router, tokenization.router, operations):
        app.include_router(router)
    return app


def _service(engine: "Engine", metrics: Metrics, settings: Settings) -> Service:
    capacity = settings.max_num_seqs + settings.max_queued_requests
    return Service(
        AsyncEngine(engine, capacity, metrics.observe, settings.max_queued_tokens, settings.step_timeout),
        settings.model_name,
        num_spec_tokens=settings.tree_nodes - 1,
        created=int(time.time()),
        max_logprobs=settings.max_logprobs,
        trust_request_chat_template=settings.trust_request_chat_template,
        tool_call_parser=settings.tool_call_parser,
    )


@operations.get("/livez", response_model=Status, responses={503: {"model": Status}})
async def livez(request: Request) -> JSONResponse:
    """503 once only a new process can help: the engine's thread has ended, or a step takes longer than it may."""
    life: Lifecycle = request.app.state.life
    return JSONResponse({"status": "ok" if life.live else "failed"}, 200 if life.live else 503)


@operations.get("/health", response_model=Status, responses={503: {"model": Status}})
@operations.get("/readyz", response_model=Status, responses={503: {"model": Status}})
async def readyz(request: Request) -> JSONResponse:
    """200 while requests are taken; 503 while the model is loaded, with phase and percent, and once the server drains."""
    life: Lifecycle = request.app.state.life
    return JSONResponse(life.status(), 200 if life.ready else 503)


@operations.get("/version")
async def server_version() -> dict[str, str]:
    """Version of the server."""
    return {"version": _version()}


@operations.get("/metrics", response_class=PlainTextResponse)
async def prometheus(request: Request) -> Response:
    """Prometheus metrics."""
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _version() -> str:
    try:
        return version("vsd-serve")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"
