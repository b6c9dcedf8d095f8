"""What happens to the prompts of a request that generates: admission, and the outputs as one answer or as events."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from fastapi import Request, Response

from server.engine.async_engine import EngineRequest, OutputStream
from server.engine.types import RequestOutput, SpeculationStats
from server.openai.choices import ChoiceBuilder
from server.openai.errors import APIError, ErrorResponse
from server.openai.protocol import (
    MAX_CHOICES,
    Answer,
    GenerationRequest,
    PromptTokensDetails,
    RequestMetrics,
    SpeculationMetrics,
    Usage,
)
from server.openai.service import Prompt, Service
from server.openai.streaming import event_stream, unless_disconnected

CLIENT_CLOSED = 499  # nginx's status for a client that left; nobody reads it
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (400, 404)}  # beside those of the gate


class Form(NamedTuple):
    """How the answers of a route are named: prefix of their ids, model and ``object`` of a whole one and of an event."""

    prefix: str
    whole: type[Answer]
    whole_object: str
    event: type[Answer]
    event_object: str


def check_options(body: GenerationRequest, num_prompts: int, service: Service) -> None:
    """Refuse, before any work, what depends on several fields or on the model."""
    service.check_model(body.model)
    if num_prompts * body.n > MAX_CHOICES:
        raise APIError(400, f"n: {num_prompts} prompts x n {body.n} make more than {MAX_CHOICES} choices.", param="n")
    if "stream_options" in body.model_fields_set and not body.stream:
        raise APIError(400, "stream_options: only allowed when stream is true.", param="stream_options")
    if (body.alternatives or 0) > service.max_logprobs:
        field = body.alternatives_field
        raise APIError(400, f"{field}: must be at most {service.max_logprobs} on this server, got {body.alternatives}.", param=field)
    for name, ids in (("logit_bias", body.logit_bias), ("stop_token_ids", body.stop_token_ids)):
        if any(token >= service.vocab_size for token in ids):
            raise APIError(400, f"{name}: token ids must be below the vocabulary's {service.vocab_size}.", param=name)


async def respond(
    body: GenerationRequest,
    prompts: list[Prompt],
    builders: Sequence[ChoiceBuilder],
    form: Form,
    service: Service,
    http: Request,
    stack: AsyncExitStack,
) -> Response:
    """Run ``body.n`` choices of each prompt, whose ``builders`` are in the order of their index, and answer as the client asked."""
    reply = Reply(body, prompts, builders, form, service)
    outputs = await stack.enter_async_context(service.engine.generate(reply.engine_requests()))
    if body.stream:
        return event_stream(reply.events(outputs))
    answer = await unless_disconnected(http, reply.whole(outputs))
    if answer is None:
        return Response(status_code=CLIENT_CLOSED)
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


class Reply:
    """The answer to one client: its requests to the engine, and their outputs as a completion or as events."""

    def __init__(
        self, body: GenerationRequest, prompts: list[Prompt], builders: Sequence[ChoiceBuilder], form: Form, service: Service
    ) -> None:
        self._body, self._prompts, self._builders, self._form, self._service = body, prompts, builders, form, service
        self._id = f"{form.prefix}-{uuid.uuid4().hex}"
        self._head: dict[str, Any] = {"id": self._id, "created": int(time.time()), "model": service.model_name}
        self._index = {f"{self._id}-{builder.index}": builder.index for builder in builders}
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)

    def engine_requests(self) -> list[EngineRequest]:
        """APIError for a prompt that leaves too little of the context."""
        n, limits = self._body.n, [self._completion_limit(prompt) for prompt in self._prompts]
        return [
            EngineRequest(name, self._prompts[i // n].token_ids, self._body.sampling_params(i % n, limits[i // n]))
            for name, i in self._index.items()
        ]

    def _completion_limit(self, prompt: Prompt) -> int:
        limit = self._service.completion_limit(prompt, self._body.token_limit)
        if self._body.min_tokens > limit:
            message = f"min_tokens: must be at most the {limit} tokens of the completion, got {self._body.min_tokens}."
            raise APIError(400, message, param="min_tokens")
        return limit

    async def whole(self, stream: OutputStream) -> Answer:
        """The answer once everything is generated; APIError at the first failure."""
        collected: list[list[RequestOutput]] = [[] for _ in self._index]
        async for outputs in stream:
            for output in outputs:
                collected[self._index[output.request_id]].append(output)
                if output.finish_reason in ("error", "abort"):
                    self._builders[0].whole([output])
        choices = [builder.whole(outputs) for builder, outputs in zip(self._builders, collected, strict=True)]
        head = {**self._head, "object": self._form.whole_object}
        return self._form.whole(**head, choices=choices, usage=self._usage(), metrics=self._metrics(collected[0][-1].speculation))

    async def events(self, stream: OutputStream) -> AsyncIterator[Answer]:
        """The events of a choice tell all that came since the last look at the stream: a slow reader gets fewer, longer ones."""
        options, head = self._body.stream_options, {**self._head, "object": self._form.event_object}
        speculation: SpeculationStats | None = None
        async for outputs in stream:
            grouped: dict[int, list[RequestOutput]] = {}
            for output in outputs:
                grouped.setdefault(self._index[output.request_id], []).append(output)
            for index, group in grouped.items():
                speculation = group[-1].speculation
                for choice in self._builders[index].events(group):
                    event = self._form.event(**head, choices=[choice])
                    if options.include_usage or options.continuous_usage_stats:
                        event.usage = self._usage() if options.continuous_usage_stats else None
                    yield event
        if options.include_usage:
            yield self._form.event(**head, choices=[], usage=self._usage(), metrics=self._metrics(speculation))

    def _usage(self) -> Usage:
        generated = sum(builder.completion_tokens for builder in self._builders)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=generated,
            total_tokens=self._prompt_tokens + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(b.cached_tokens for b in self._builders[:: self._body.n])),
        )

    def _metrics(self, last: SpeculationStats | None) -> RequestMetrics:
        """``last``: what the output that closed the only choice told, if there is but one."""
        if not self._service.speculative or len(self._builders) > 1 or last is None:
            return RequestMetrics(speculative_decoding=None)
        return RequestMetrics(speculative_decoding=SpeculationMetrics.create(last, self._service.num_spec_tokens))
