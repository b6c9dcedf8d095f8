"""Functions that the model may call: what requests say of them, the form that forced calls must have, and what answers say."""

import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.engine.types import Grammar
from server.openai.structured import schema_grammar
from server.openai.tool_parsers import PARSERS, JsonParser, NamedParser, ToolFormat, ToolParser

MAX_TOOLS = 128
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(BaseModel):
    """Further fields are handed to the template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments; none without it.")
    strict: bool | None = Field(None, description="Forced calls always keep to the parameters.")


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def forced_calls(tools: list[Tool], choice: ToolChoice, parallel: bool) -> Grammar | None:
    """The form of an answer that must call: the arguments of a named function, or a list of calls. None if it need not."""
    if isinstance(choice, NamedTool):
        [function] = [tool.function for tool in tools if tool.function.name == choice.function.name]
        return schema_grammar(function.parameters or NO_PARAMETERS)
    if choice != "required":
        return None
    calls = [_call_schema(tool.function, f"#/items/anyOf/{i}/properties/arguments") for i, tool in enumerate(tools)]
    most = {} if parallel else {"maxItems": 1}
    return schema_grammar({"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most})


def _call_schema(function: Function, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": _moved(function.parameters or NO_PARAMETERS, place)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """The schema as a part of another one, at ``place``: its references to itself begin there. ValueError if it is nested too deeply."""
    try:
        return _move(schema, place)
    except RecursionError:
        raise ValueError("the parameters are nested too deeply") from None


def _move(schema: Any, place: str) -> Any:
    if isinstance(schema, list):
        return [_move(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _move(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference.removeprefix("#")
    return moved


def parser_for(choice: ToolChoice, form: ToolFormat | None) -> ToolParser | None:
    """What reads the calls in an answer; None if there can be none."""
    if isinstance(choice, NamedTool):
        return NamedParser(choice.function.name)
    if choice == "required":
        return JsonParser("[],")
    return PARSERS[form]() if choice == "auto" and form is not None else None


class CalledFunction(BaseModel):
    """``arguments``: JSON text."""

    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class CallDelta(BaseModel):
    """What an event adds to call ``index``; id, type and name come with its first."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
