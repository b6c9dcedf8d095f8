"""Structured output: what requests say of the form of the answer, as a grammar of the engine."""

import asyncio
import json
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.engine.config import EngineError
from server.engine.grammar import MAX_CHARACTERS
from server.engine.types import Grammar
from server.openai.errors import APIError

if TYPE_CHECKING:
    from server.openai.protocol import GenerationRequest
    from server.openai.service import Service

COMPILE_SECONDS = 10.0
MAX_CHOICES_OF_TEXT = 4096


def schema_grammar(schema: Any) -> Grammar:
    """ValueError for a schema that is nested too deeply to be written down, or too long."""
    if isinstance(schema, str):
        return Grammar("json_schema", schema)
    text = StringIO()
    try:
        for part in json.JSONEncoder().iterencode(schema):  # up to the limit only, since it may have any length
            if text.tell() + len(part) > MAX_CHARACTERS:
                raise ValueError(f"the schema has more than {MAX_CHARACTERS} characters")
            text.write(part)
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None
    return Grammar("json_schema", text.getvalue())


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, protected_namespaces=())

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="The schema is always kept to.")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        return self

    @property
    def grammar(self) -> Grammar | None:
        if self.json_schema is not None:
            return schema_grammar(self.json_schema.definition)
        return Grammar("json_object") if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """vLLM's form. ``grammar``: in Lark's or GBNF's notation."""

    model_config = ConfigDict(strict=True)

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=MAX_CHOICES_OF_TEXT)
    grammar: str | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> "StructuredOutputs":
        if sum(value not in (None, False) for value in dict(self).values()) != 1:
            raise ValueError("expected exactly one of json, json_object, regex, choice and grammar")
        return self

    def as_grammar(self) -> Grammar:
        if self.json_ is not None:
            return schema_grammar(self.json_)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("choice", json.dumps(self.choice))
        return Grammar("json_object") if self.grammar is None else Grammar("grammar", self.grammar)


async def compile_grammar(body: "GenerationRequest", service: "Service") -> None:
    """Compile what the answer must match, in a thread; APIError if that fails, takes too long, or does not go with other options."""
    try:
        grammar = body.grammar
        if grammar is None:
            return
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.run_in_executor(service.compilers, service.grammars.matcher, grammar), COMPILE_SECONDS)
    except TimeoutError:
        message = f"{body.grammar_field}: compiling it takes longer than {COMPILE_SECONDS:g} seconds."
        raise APIError(400, message, param=body.grammar_field) from None
    except (EngineError, ValueError) as error:
        raise APIError(400, f"{body.grammar_field}: {error}", param=body.grammar_field) from error
    for field in ("min_tokens", "ignore_eos"):
        if getattr(body, field):
            raise APIError(400, f"{field}: cannot be used with {body.grammar_field}, which decides where the answer ends.", param=field)
