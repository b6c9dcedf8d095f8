"""The OpenAPI document: what the routes say of themselves, and what is answered in front of them and beside them."""

from http.client import responses as reasons
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.gate import ALWAYS, PROBES
from server.openai import chat, completions
from server.openai.errors import ErrorResponse

PLACE = "#/components/schemas/{model}"
STREAMS = {"/v1/completions": completions.FORM.event, "/v1/chat/completions": chat.FORM.event}
SCHEME = "key"
_MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/completions": {
        "whole": {"prompt": "The sea", "max_tokens": 8, "temperature": 0},
        "stream": {"prompt": "The sea", "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
    },
    "/v1/chat/completions": {
        "whole": {"messages": _MESSAGES, "max_completion_tokens": 8, "temperature": 0},
        "stream": {"messages": _MESSAGES, "max_completion_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
    },
    "/tokenize": {"text": {"prompt": "The sea"}, "messages": {"messages": _MESSAGES}},
    "/detokenize": {"tokens": {"tokens": [1, 2]}},
}
HEADERS = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}}},
    503: {"Retry-After": {"required": True, "description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}},
}


class DescribedAPI(FastAPI):
    """``needs_key``: the gate asks for a key. ``options``: FastAPI's."""

    def __init__(self, needs_key: bool, **options: Any) -> None:
        super().__init__(**options)
        self.openapi_version = "3.2.0"  # the first that can describe the events of a stream
        self._needs_key = needs_key

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            _complete(document, self._needs_key)
        assert self.openapi_schema is not None
        return self.openapi_schema


def _complete(document: dict[str, Any], needs_key: bool) -> None:
    components = document["components"]
    bodies: list[type[BaseModel]] = [ErrorResponse, *STREAMS.values()]
    _, models = models_json_schema([(body, "serialization") for body in bodies], ref_template=PLACE)
    components["schemas"] = models["$defs"] | components["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form, which nobody gets to see
        components["schemas"].pop(name, None)
    if needs_key:
        components["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            answers.pop("422", None)
            for status in _statuses_of_gate(path.encode(), needs_key):
                answers.setdefault(str(status), _error(status))
            if needs_key and path.encode() not in PROBES:
                operation["security"] = [{SCHEME: []}]
            if path in EXAMPLES:
                examples = {name: {"value": body} for name, body in EXAMPLES[path].items()}
                operation["requestBody"]["content"]["application/json"]["examples"] = examples
            if path in STREAMS:
                answers["200"]["content"]["text/event-stream"] = {"itemSchema": _event(STREAMS[path].__name__)}


def _statuses_of_gate(path: bytes, needs_key: bool) -> list[int]:
    key = [401] if needs_key and path not in PROBES else []
    return [*key, 413, 431, 500] if path in ALWAYS else [*key, 413, 431, 500, 503]


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": PLACE.format(model="ErrorResponse")}}}
    return {"description": reasons[status], "content": content, "headers": HEADERS.get(status, {})}


def _event(model: str) -> dict[str, Any]:
    """Of a stream: a part of the answer, an error, or the end."""
    parts = [{"$ref": PLACE.format(model=name)} for name in (model, "ErrorResponse")]
    data = [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": {"anyOf": parts}}]
    return {"type": "object", "properties": {"data": {"type": "string", "anyOf": data}}, "required": ["data"]}
