"""What goes over the wire at /v1/completions."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator

from server.engine.types import SamplingParams
from server.openai.protocol import MAX_CHOICES, Answer, GenerationRequest, Unsupported, is_text

Prompts = list[str] | list[list[int]]
# As ``parse_prompts`` takes them.
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICES)]
_ListsOfIds = Annotated[list[_Ids], Field(min_length=1, max_length=MAX_CHOICES)]


def parse_prompts(value: Any) -> Prompts:
    """The four forms (text, texts, token ids, lists of token ids) as a list of texts or of id lists."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("expected a non-empty string, list of strings, list of token ids, or list of lists of token ids")
    if all(type(item) is int for item in value):
        value = [value]
    check = _check_text if all(isinstance(item, str) for item in value) else _check_ids
    for item in value:
        check(item)
    if len(value) > MAX_CHOICES:
        raise ValueError(f"at most {MAX_CHOICES} prompts may be sent at once, got {len(value)}")
    return value


def _check_text(text: str) -> None:
    if not text:
        raise ValueError("the prompt is empty")
    if not is_text(text):
        raise ValueError("the prompt holds half of a surrogate pair, which is no character")


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, list):
        raise ValueError(f"expected a string or a list of token ids, found {type(ids).__name__}; the forms cannot be mixed")
    if not ids:
        raise ValueError("the prompt is empty")
    for token in ids:
        if type(token) is not int or token < 0:  # bool is a subclass of int
            raise ValueError("token ids must be non-negative integers")


class CompletionRequest(GenerationRequest):
    """OpenAI's completion request and vLLM's sampling extensions."""

    alternatives_field = "logprobs"

    prompt: Annotated[Prompts, PlainValidator(parse_prompts, json_schema_input_type=_Text | _Texts | _Ids | _ListsOfIds)]
    max_tokens: int = Field(16, ge=0, lt=2**31)
    best_of: int | None = Field(None, description="Only accepted when equal to n.")
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False
    suffix: Unsupported = Field(None, description="Not supported.")
    prompt_embeds: Unsupported = Field(None, description="Not supported.")

    @property
    def token_limit(self) -> int:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def sampling_params(self, child: int, max_tokens: int) -> SamplingParams:
        params = super().sampling_params(child, max_tokens)
        return replace(params, prompt_logprobs=self.logprobs) if self.echo else params


class Logprobs(BaseModel):
    """Parallel lists, one entry per token. ``text_offset`` counts characters from the beginning of the choice's text."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[Choice]
