"""Errors in the shape of the OpenAI API: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server.engine.async_engine import QueueFullError
from server.engine.config import EngineError

RETRY_AFTER = "1"  # seconds


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class APIError(Exception):
    """What the client is told, and with which status."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, headers)


def internal_error() -> APIError:
    return APIError(500, "The server had an error while processing the request.")


def context_length_error(limit: int, message: str) -> APIError:
    """``limit`` in tokens. Proxies recognise this error by the opening words."""
    return APIError(400, f"This model's maximum context length is {limit} tokens. {message}", code="context_length_exceeded")


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def api_error(_: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(QueueFullError)
    async def queue_full(request: Request, _: QueueFullError) -> JSONResponse:
        request.app.state.service.metrics.count_rejected()
        error = APIError(503, "The server is overloaded: its queue is full. Retry later.", code="server_overloaded")
        return error.response({"retry-after": RETRY_AFTER})

    @app.exception_handler(EngineError)
    async def engine_error(_: Request, error: EngineError) -> JSONResponse:
        return APIError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return _first_fault(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"Unknown URL: {request.method} {request.scope['path']}" if error.status_code == 404 else str(error.detail)
        return APIError(error.status_code, message).response(dict(error.headers or {}))


def _first_fault(faults: Any) -> APIError:
    """The first thing that is wrong; its ``param`` is the name of the field."""
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return APIError(400, f"The body is not valid JSON: {fault['ctx']['error']} at character {fault['loc'][-1]}.")
    path = [str(part) for part in fault["loc"][1:]]
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not path:
        return APIError(400, f"The body must be a JSON object sent as application/json: {message}.")
    return APIError(400, f"{'.'.join(path)}: {message}", param=path[0])
