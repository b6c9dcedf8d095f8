"""What goes over the wire at /v1/chat/completions, and the messages of /tokenize."""

import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator, model_validator

from server.engine.types import Grammar
from server.openai.protocol import Answer, GenerationRequest, RequestBody, Unsupported
from server.openai.tools import MAX_TOOLS, Call, CallDelta, NamedTool, Tool, ToolChoice, forced_calls

MAX_MESSAGES = 4096


def join_parts(content: Any) -> Any:
    """The text of a list of text parts, one below the other; anything else as it is."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = str(part.get("type") if isinstance(part, dict) else type(part).__name__)
            raise ValueError(f'part {i} is of type {kind[:40]!r}; only {{"type": "text", "text": "..."}} is supported')
    return "\n".join(part["text"] for part in content)


def parse_arguments(value: Any) -> dict[str, Any]:
    """Templates want an object where the API has its JSON text."""
    try:
        arguments = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError("expected the text of a JSON object")
    return arguments


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    arguments: Annotated[dict[str, Any], PlainValidator(parse_arguments, json_schema_input_type=str | dict[str, Any])]


class ToolCall(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One turn; further fields are handed to the template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(join_parts, json_schema_input_type=str | list[TextPart] | None)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the assistant has tool_calls")
        return self


class Conversation(RequestBody):
    """Messages, and how the chat template makes a prompt of them."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool | None = Field(None, description="Begin the assistant's turn; true unless continue_final_message.")
    continue_final_message: bool = Field(False, description="Leave the last message open, and continue it.")
    chat_template: str | None = Field(None, description="Only on a server that trusts its clients' templates.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables for the template.")
    tools: list[Tool] = Field([], max_length=MAX_TOOLS, description="Functions that the model may call.")

    @field_validator("tools")
    @classmethod
    def _names_differ(cls, value: list[Tool]) -> list[Tool]:
        if len({tool.function.name for tool in value}) < len(value):
            raise ValueError("the functions must have different names")
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _opens_or_continues(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("add_generation_prompt"):
            raise ValueError("cannot be true together with add_generation_prompt")
        return value

    @property
    def offered_tools(self) -> list[Tool]:
        """What the template tells the model of."""
        return self.tools

    @property
    def opens_turn(self) -> bool:
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class ChatRequest(Conversation, GenerationRequest):
    """OpenAI's chat request, and the extensions of vLLM."""

    alternatives_field = "top_logprobs"

    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="What is left of the context by default.")
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Older name of max_completion_tokens, which wins.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, description="Only with logprobs.")
    add_special_tokens: bool = Field(False, description="Tokens that the tokenizer puts around texts, beside the template's own.")
    tool_choice: ToolChoice | None = Field(None, description="auto if there are tools, else none.")
    parallel_tool_calls: bool = Field(True, description="False for one call at most.")
    functions: Unsupported = Field(None, description="Not supported.")
    function_call: Unsupported = Field(None, description="Not supported.")

    @field_validator("tool_choice")
    @classmethod
    def _has_its_tools(cls, value: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        names = [tool.function.name for tool in info.data.get("tools", [])]
        if value not in (None, "none") and not names:
            raise ValueError("only allowed when there are tools")
        if isinstance(value, NamedTool) and value.function.name not in names:
            raise ValueError(f"no function of tools is named {value.function.name!r}")
        return value

    @property
    def calling(self) -> ToolChoice:
        """Whether the model may call, must, or which function."""
        return self.tool_choice or ("auto" if self.tools else "none")

    @property
    def offered_tools(self) -> list[Tool]:
        return [] if self.calling == "none" else self.tools

    @property
    def grammar_field(self) -> str:
        return super().grammar_field if self.calling in ("none", "auto") else "tools"

    @cached_property
    def grammar(self) -> Grammar | None:
        return forced_calls(self.tools, self.calling, self.parallel_tool_calls) or super().grammar

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenChoice(BaseModel):
    """``bytes``: of the text in UTF-8. A generated token has the bytes that it completed, so that they join to the whole text."""

    token: str
    logprob: float
    bytes: list[int]


class TokenReport(TokenChoice):
    """``top_logprobs``: as many of the most likely tokens as were asked for, best first."""

    top_logprobs: list[TokenChoice]


class ChatLogprobs(BaseModel):
    content: list[TokenReport]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] | None = None


class Delta(BaseModel):
    """What an event adds to the message; fields that were not given are left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class _ChatChoice(BaseModel):
    index: int
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: int | str | None


class ChatChoice(_ChatChoice):
    message: AssistantMessage


class ChatChunkChoice(_ChatChoice):
    delta: Delta


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
