"""What requests and answers of all routes that generate have in common on the wire."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue

from server.engine.types import Grammar, SamplingParams, SpeculationStats
from server.openai.structured import ResponseFormat, StructuredOutputs

MAX_CHOICES = 128
MAX_STOP, MAX_STOP_CHARACTERS, MAX_STOP_TOKENS = 16, 256, 128
MAX_LOGIT_BIAS = 1024
INT64 = 2**63


def _refuse(value: Any) -> None:
    if value:  # false, 0, "" and empty lists ask for nothing
        raise ValueError("this server does not support it")


def is_text(text: str) -> bool:
    """False for a string with half of a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Whatever ``_refuse`` lets pass.
Unsupported = Annotated[None, PlainValidator(_refuse), WithJsonSchema({"enum": [None, False, 0, "", [], {}]})]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOP)]


def _allow_null(schema: JsonSchemaValue) -> None:
    null = {"type": "null"}
    if isinstance(schema.get("type"), str):
        schema["type"] = sorted({schema["type"], "null"})
    elif "$ref" in schema:
        schema["anyOf"] = [{"$ref": schema.pop("$ref")}, null]
    elif "anyOf" in schema and null not in schema["anyOf"]:
        schema["anyOf"].append(null)


class RequestBody(BaseModel):
    """Null means the default; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(None, description="Name of the served model; it is the default.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(core_schema)
        schema = handler.resolve_ref_schema(described)
        for name in schema["properties"].keys() - schema.get("required", []):
            _allow_null(schema["properties"][name])
        return described


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SpeculationOptions(BaseModel):
    """How much may be drafted for a request. It changes the speed, never the text."""

    model_config = ConfigDict(strict=True)

    enabled: bool = True
    max_nodes: int | None = Field(default=None, ge=0, description="Most drafted nodes of a verification, the root not counted.")


class GenerationRequest(RequestBody):
    """The sampling options of OpenAI and vLLM."""

    alternatives_field: ClassVar[str]

    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1 keep every token.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    logit_bias: dict[Annotated[int, Field(strict=False, ge=0, lt=2**31)], Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=MAX_LOGIT_BIAS
    )
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="Choice i uses seed + i.")
    stop: Annotated[
        StopTexts,
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=StopText | StopTexts),
    ] = Field([])
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([], max_length=MAX_STOP_TOKENS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    speculation: SpeculationOptions = SpeculationOptions()
    cache_salt: str | None = Field(
        None, min_length=1, max_length=1024, description="Only requests of the same salt share computed prompts."
    )
    priority: int = Field(0, ge=-INT64, lt=INT64, description="Ignored: first come, first served.")
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, str] = Field({}, description="Ignored.")
    store: bool = Field(False, description="Ignored: nothing is stored.")
    response_format: ResponseFormat = ResponseFormat(type="text")
    structured_outputs: StructuredOutputs | None = Field(None, description="Instead of response_format.")
    allowed_token_ids: Unsupported = Field(None, description="Not supported.")
    bad_words: Unsupported = Field(None, description="Not supported.")
    use_beam_search: Unsupported = Field(None, description="Not supported.")
    prompt_logprobs: Unsupported = Field(None, description="Not supported.")

    @field_validator("structured_outputs")
    @classmethod
    def _one_form(cls, value: StructuredOutputs | None, info: ValidationInfo) -> StructuredOutputs | None:
        if value is not None and info.data.get("response_format", ResponseFormat(type="text")).type != "text":
            raise ValueError("cannot be used together with response_format")
        return value

    @property
    def grammar_field(self) -> str:
        """The field that ``grammar`` comes from."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @cached_property
    def grammar(self) -> Grammar | None:
        """What the whole answer must match."""
        return self.response_format.grammar if self.structured_outputs is None else self.structured_outputs.as_grammar()

    @property
    @abstractmethod
    def token_limit(self) -> int | None:
        """Most tokens of a choice; None leaves it to the context."""

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """Alternatives reported for each token, as ``alternatives_field`` says; None for no log-probabilities at all."""

    def sampling_params(self, child: int, max_tokens: int) -> SamplingParams:
        """How choice ``child`` of a prompt samples."""
        seed = None if self.seed is None else (self.seed + child + INT64) % (2 * INT64) - INT64
        return SamplingParams(
            max_tokens=max_tokens,
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
            logprobs=self.alternatives,
            max_draft_nodes=self.speculation.max_nodes if self.speculation.enabled else 0,
            cache_salt=self.cache_salt,
            grammar=self.grammar,
        )


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """``prompt_tokens`` counts every prompt once, however many choices it has; ``cached_tokens`` those that its first choice reused."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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


class Answer(BaseModel):
    """A whole answer, or one event of a stream; fields that were not given are left out."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[BaseModel]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
