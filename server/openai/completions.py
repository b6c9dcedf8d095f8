"""/v1/completions."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from server.engine.async_engine import EngineRequest, OutputStream
from server.engine.types import RequestOutput, SpeculationStats
from server.openai.choices import ChoiceBuilder
from server.openai.errors import APIError, ErrorResponse
from server.openai.protocol import (
    MAX_CHOICES,
    Completion,
    CompletionRequest,
    PromptTokensDetails,
    RequestMetrics,
    SpeculationMetrics,
    Usage,
)
from server.openai.service import CurrentService, Prompt, RequestStack, Service
from server.openai.streaming import event_stream, unless_disconnected

CLIENT_CLOSED = 499  # nginx's status for a client that left; nobody reads it
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (400, 404, 413, 500, 503)}

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=ERRORS)
async def create_completion(body: CompletionRequest, http: Request, service: CurrentService, stack: RequestStack) -> Response:
    """Continue one or several prompts."""
    service.check_model(body.model)
    _check(body, service.vocab_size)
    prompts = await service.tokenize(body.prompt)
    for prompt in prompts:
        service.check_length(prompt, body.max_tokens)
    reply = Reply(body, prompts, service)
    outputs = await stack.enter_async_context(service.engine.generate(reply.engine_requests()))
    if body.stream:
        return event_stream(reply.events(outputs))
    completion = await unless_disconnected(http, reply.whole(outputs))
    if completion is None:
        return Response(status_code=CLIENT_CLOSED)
    return Response(completion.model_dump_json(exclude_unset=True), media_type="application/json")


def _check(body: CompletionRequest, vocab_size: int) -> None:
    """What depends on several fields or on the model."""
    if body.suffix:
        raise APIError(400, "suffix: this model cannot insert text.", param="suffix")
    if body.best_of not in (None, body.n):
        raise APIError(400, f"best_of: only the value of n is supported, got {body.best_of} with n {body.n}.", param="best_of")
    if len(body.prompt) * body.n > MAX_CHOICES:
        raise APIError(400, f"n: {len(body.prompt)} prompts x n {body.n} make more than {MAX_CHOICES} choices.", param="n")
    if body.max_tokens == 0 and not body.echo:
        raise APIError(400, "max_tokens: must be at least 1 unless echo is true.", param="max_tokens")
    if body.min_tokens > body.max_tokens:
        raise APIError(400, f"min_tokens: must be at most max_tokens ({body.max_tokens}), got {body.min_tokens}.", param="min_tokens")
    if "stream_options" in body.model_fields_set and not body.stream:
        raise APIError(400, "stream_options: only allowed when stream is true.", param="stream_options")
    for name, ids in (("logit_bias", body.logit_bias), ("stop_token_ids", body.stop_token_ids)):
        if any(token >= vocab_size for token in ids):
            raise APIError(400, f"{name}: token ids must be below the vocabulary's {vocab_size}.", param=name)


class Reply:
    """The answer to one client: its requests to the engine, and their outputs as a completion or as events."""

    def __init__(self, body: CompletionRequest, prompts: list[Prompt], service: Service) -> None:
        self._body, self._prompts, self._service = body, prompts, service
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._head: dict[str, Any] = {"id": self._id, "object": "text_completion", "created": int(time.time()), "model": service.model_name}
        self._index = {f"{self._id}-{i}": i for i in range(len(prompts) * body.n)}
        self._builders = [ChoiceBuilder(i, prompts[i // body.n], body, service.tokenizer, service.token_text) for i in self._index.values()]
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._speculation: SpeculationStats | None = None

    def engine_requests(self) -> list[EngineRequest]:
        n = self._body.n
        return [EngineRequest(name, self._prompts[i // n].token_ids, self._body.sampling_params(i % n)) for name, i in self._index.items()]

    async def whole(self, stream: OutputStream) -> Completion:
        """The completion once everything is generated; APIError at the first failure."""
        collected: list[list[RequestOutput]] = [[] for _ in self._index]
        async for outputs in stream:
            for output in outputs:
                if output.finish_reason in ("error", "abort"):
                    self._builders[0].build([output])
                collected[self._index[output.request_id]].append(output)
        choices = [builder.build(outputs) for builder, outputs in zip(self._builders, collected, strict=True)]
        return Completion(**self._head, choices=choices, usage=self._usage(), metrics=self._metrics(collected[0][-1]))

    async def events(self, stream: OutputStream) -> AsyncIterator[Completion]:
        """One event per choice and look at the stream: a slow reader gets fewer, longer ones."""
        options = self._body.stream_options
        last: RequestOutput | None = None
        async for outputs in stream:
            grouped: dict[int, list[RequestOutput]] = {}
            for output in outputs:
                grouped.setdefault(self._index[output.request_id], []).append(output)
            for index, group in grouped.items():
                last = group[-1]
                event = Completion(**self._head, choices=[self._builders[index].build(group)])
                if options.include_usage or options.continuous_usage_stats:
                    event.usage = self._usage() if options.continuous_usage_stats else None
                yield event
        if options.include_usage and last is not None:
            yield Completion(**self._head, choices=[], usage=self._usage(), metrics=self._metrics(last))

    def _usage(self) -> Usage:
        generated = sum(builder.completion_tokens for builder in self._builders)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=generated,
            total_tokens=self._prompt_tokens + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(b.cached_tokens for b in self._builders[:: self._body.n])),
        )

    def _metrics(self, last: RequestOutput) -> RequestMetrics:
        """``last``: the output that closed the only choice, if there is but one."""
        if not self._service.speculative or len(self._builders) > 1 or last.speculation is None:
            return RequestMetrics(speculative_decoding=None)
        return RequestMetrics(speculative_decoding=SpeculationMetrics.create(last.speculation, self._service.num_spec_tokens))
