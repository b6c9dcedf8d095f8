"""How bodies become JSON."""

import gc
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute


class _Request(Request):
    async def json(self) -> Any:
        body = await self.body()
        gc.disable()  # it would go through millions of small lists again and again, and stop everyone else for seconds
        try:
            return json.loads(body)
        finally:
            gc.enable()


class JsonRoute(APIRoute):
    """A route whose body is read without the garbage collector."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handle_json
