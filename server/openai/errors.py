"""Errors in the shape of the OpenAI API: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server.engine.async_engine import QueueFullError
from server.engine.config import EngineError

RETRY_SOON, RETRY_LATER = "1", "5"  # seconds until a client should try again: a queue moves on, a model takes its time


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class APIError(Exception):
    """What the client is told, and with which status and headers."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def internal_error() -> APIError:
    return APIError(500, "The server had an error while processing the request.")


def unavailable(message: str, code: str, retry_after: str = RETRY_LATER) -> APIError:
    return APIError(503, message, code=code, headers={"retry-after": retry_after})


def context_length_error(limit: int, message: str) -> APIError:
    """``limit`` in tokens. Proxies recognise this error by the opening words."""
    return APIError(400, f"This model's maximum context length is {limit} tokens. {message}", code="context_length_exceeded")


def answer_to(error: Exception) -> APIError:
    """What a client is told about ``error``: the one place that decides it. Of errors that nobody expected, nothing."""
    match error:
        case APIError():
            return error
        case QueueFullError():
            return unavailable("The server is overloaded: its queue is full. Retry later.", "server_overloaded", RETRY_SOON)
        case EngineError():
            return APIError(400, str(error))
        case RequestValidationError():
            return _first_fault(error.errors())
        case HTTPException():
            return APIError(error.status_code, str(error.detail), headers=error.headers)
    return internal_error()


def add_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, QueueFullError):
            request.app.state.metrics.count_rejected()
        if isinstance(error, HTTPException) and error.status_code == 404:
            error = APIError(404, f"Unknown URL: {request.method} {request.scope['path']}")
        return answer_to(error).response()

    for kind in (APIError, QueueFullError, EngineError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


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
