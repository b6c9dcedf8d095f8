"""What holds for every route: a request id in the answer, the key where one is set, nobody let in who cannot be served."""

import hashlib
import logging
import re
import secrets
import uuid
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.lifecycle import Lifecycle
from server.openai.errors import APIError, answer_to

logger = logging.getLogger(__name__)
PROBES = frozenset({b"/health", b"/livez", b"/readyz"})
ALWAYS = PROBES | {b"/metrics", b"/version", b"/openapi.json"}  # answered while there is no engine to ask
MAX_BODY = 16 * 2**20  # bytes
MAX_HEADER_BYTES, MAX_HEADERS = 64 * 2**10, 256
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Gate:
    """Paths are judged as the client sent them, before any decoding. ``api_keys`` empty: none is asked for."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], life: Lifecycle) -> None:
        self._app, self._life = app, life
        self._expected = [_digest(f"Bearer {key}".encode()) for key in api_keys]

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

        path: bytes = scope["raw_path"]
        refusal = self._refusal(path, headers)
        if refusal is not None:
            await refusal(scope, receive, send_with_id)
            return
        counted = path not in ALWAYS
        self._life.open_requests += counted
        try:
            await self._app(scope, _limited(receive), send_with_id)
        except Exception as error:
            if started:
                raise
            logger.exception("request %s failed", request_id)
            await answer_to(error).response()(scope, receive, send_with_id)
        finally:
            self._life.open_requests -= counted

    def _refusal(self, path: bytes, headers: Headers) -> JSONResponse | None:
        if self._expected and path not in PROBES and not self._has_key(headers):
            message = "Missing or wrong API key; send it as `Authorization: Bearer KEY`."
            return APIError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"}).response()
        if len(headers.raw) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
            return APIError(431, f"More than {MAX_HEADERS} headers, or than {MAX_HEADER_BYTES} bytes of them.").response()
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY:
            return _too_large().response()
        refusal = None if path in ALWAYS else self._life.refusal()
        return None if refusal is None else refusal.response()

    def _has_key(self, headers: Headers) -> bool:
        """Compared with every key, in a time that depends on none of them."""
        given = _digest(headers.get("authorization", "").encode("latin-1"))
        return sum(secrets.compare_digest(given, expected) for expected in self._expected) > 0


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


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
