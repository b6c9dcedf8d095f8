"""The web application: routes, middleware, lifespan."""

import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine.async_engine import AsyncEngine
from server.metrics import Metrics
from server.openai import chat, completions, models, tokenization
from server.openai.errors import APIError, add_error_handlers, internal_error
from server.openai.service import CurrentService, Service
from server.settings import Settings

if TYPE_CHECKING:
    from server.engine.engine import Engine

logger = logging.getLogger(__name__)
PROBES = frozenset({"/health", "/livez", "/readyz"})
MAX_BODY = 32 * 2**20  # bytes
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

operations = APIRouter()


def create_app(engine: "Engine", settings: Settings) -> FastAPI:
    """The application that serves ``engine``; its lifespan runs the engine thread."""
    metrics = Metrics(settings.model_name)
    capacity = settings.max_num_seqs + settings.max_queued_requests
    async_engine = AsyncEngine(engine, capacity, metrics.observe, settings.max_queued_tokens)
    service = Service(
        async_engine,
        metrics,
        settings.model_name,
        num_spec_tokens=settings.tree_nodes - 1,
        created=int(time.time()),
        max_logprobs=settings.max_logprobs,
        trust_request_chat_template=settings.trust_request_chat_template,
        tool_call_parser=settings.tool_call_parser,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async_engine.start()
        yield
        await async_engine.stop()

    app = FastAPI(
        title="vsd-serve",
        version=_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    key = settings.api_key.get_secret_value() if settings.api_key else None
    app.add_middleware(Gate, api_key=key)
    add_error_handlers(app)
    for router in (completions.router, chat.router, models.router, tokenization.router, operations):
        app.include_router(router)
    return app


@operations.get("/health")
@operations.get("/livez")
@operations.get("/readyz")
async def health(service: CurrentService) -> JSONResponse:
    """200 while the engine runs."""
    alive = service.engine.alive
    return JSONResponse({"status": "ok" if alive else "engine stopped"}, 200 if alive else 503)


@operations.get("/version")
async def server_version() -> dict[str, str]:
    """Version of the server."""
    return {"version": _version()}


@operations.get("/metrics")
async def prometheus(service: CurrentService) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _version() -> str:
    try:
        return version("vsd-serve")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


class Gate:
    """What holds for every route: a request id in the answer, the key where one is set, and no error that tells internals."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, _limited(receive), send_with_id)
        except Exception:
            if started:
                raise
            logger.exception("request %s failed", request_id)
            await internal_error().response()(scope, receive, send_with_id)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        given = headers.get("authorization", "").encode()
        if self._expected is not None and path not in PROBES and not secrets.compare_digest(given, self._expected):
            error = APIError(401, "Missing or wrong API key; send it as `Authorization: Bearer KEY`.", code="invalid_api_key")
            return error.response({"www-authenticate": "Bearer"})
        length = headers.get("content-length", "")
        return _too_large().response() if length.isdecimal() and int(length) > MAX_BODY else None


def _too_large() -> APIError:
    return APIError(413, f"The body is larger than {MAX_BODY} bytes.")


def _limited(receive: Receive) -> Receive:
    """Stops reading a body that turns out too large."""
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY:
            raise HTTPException(413, str(_too_large()))
        return message

    return receive_limited
