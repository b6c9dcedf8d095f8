"""What goes over the wire at /v1/completions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from server.engine.types import SamplingParams, SpeculationStats

MAX_CHOICES = 128
INT64 = 2**63
Prompts = list[str] | list[list[int]]


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
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the prompt holds half of a surrogate pair, which is no character")


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, list):
        raise ValueError(f"expected a string or a list of token ids, found {type(ids).__name__}; the forms cannot be mixed")
    if not ids:
        raise ValueError("the prompt is empty")
    for token in ids:
        if type(token) is not int or token < 0:  # bool is a subclass of int
            raise ValueError("token ids must be non-negative integers")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SpeculationOptions(BaseModel):
    """How much may be drafted for a request. It changes the speed, never the text."""

    model_config = ConfigDict(strict=True)

    enabled: bool = True
    max_nodes: int | None = Field(default=None, ge=0, description="Most drafted nodes of a verification, the root not counted.")


class CompletionRequest(BaseModel):
    """OpenAI's completion request and vLLM's sampling extensions. Null means the default; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(None, description="Name of the served model; it is the default.")
    prompt: Annotated[Prompts, PlainValidator(parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])]
    max_tokens: int = Field(16, ge=0, lt=2**31)
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1 keep every token.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    logit_bias: dict[Annotated[int, Field(strict=False, ge=0, lt=2**31)], Annotated[float, Field(ge=-100, le=100)]] = Field({})
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="Choice i uses seed + i.")
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        Field(max_length=16),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=str | list[str]),
    ] = Field([])
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([], max_length=128)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, description="Only accepted when equal to n.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    suffix: str | None = Field(None, description="Not supported.")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    speculation: SpeculationOptions = SpeculationOptions()
    cache_salt: str | None = Field(
        None, min_length=1, max_length=1024, description="Only requests of the same salt share computed prompts."
    )
    user: str | None = Field(None, description="Ignored.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    def sampling_params(self, child: int) -> SamplingParams:
        """How choice ``child`` of a prompt samples."""
        seed = None if self.seed is None else (self.seed + child + INT64) % (2 * INT64) - INT64
        return SamplingParams(
            max_tokens=max(1, self.max_tokens),  # the engine always generates; echo with max_tokens 0 drops that token
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=seed,
            stop=tuple(self.stop),
            include_stop_str_in_output=self.include_stop_str_in_output,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            max_draft_nodes=self.speculation.max_nodes if self.speculation.enabled else 0,
            cache_salt=self.cache_salt,
        )


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """``prompt_tokens`` counts every prompt once, however many choices it has; ``cached_tokens`` those that its first choice reused."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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


class SpeculationMetrics(BaseModel):
    """What speculation did for the request. Lengths count tokens per verification, the bonus token included.

    ``acceptance_histogram[j]``: verifications that accepted exactly j drafted tokens; ``accepted_by_depth[d]``: those whose accepted
    path reached depth d + 1. ``num_spec_tokens``: drafted tokens of a full tree.
    """

    mean_acceptance_length: float | None
    draft_acceptance_rate: float | None
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    verified_nodes: int
    accepted_by_depth: list[int]

    @classmethod
    def create(cls, stats: SpeculationStats, num_spec_tokens: int) -> "SpeculationMetrics":
        return cls(
            mean_acceptance_length=1 + stats.num_accepted_tokens / stats.num_steps if stats.num_steps else None,
            draft_acceptance_rate=stats.num_accepted_tokens / stats.num_draft_tokens if stats.num_draft_tokens else None,
            acceptance_histogram=stats.acceptance_histogram,
            num_spec_steps=stats.num_steps,
            num_accepted_draft_tokens=stats.num_accepted_tokens,
            num_draft_tokens=stats.num_draft_tokens,
            num_spec_tokens=num_spec_tokens,
            verified_nodes=stats.verified_nodes,
            accepted_by_depth=stats.accepted_by_depth,
        )


class RequestMetrics(BaseModel):
    """``speculative_decoding`` is null on a server that decodes plainly, and for several choices."""

    speculative_decoding: SpeculationMetrics | None


class Completion(BaseModel):
    """A whole completion, or one event of a stream; fields that were not given are left out."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
