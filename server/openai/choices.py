"""Engine outputs as the choices of a completion, whole or in parts."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from server.engine.types import RequestOutput, TokenLogprob
from server.openai.completion_protocol import Choice, CompletionRequest, Logprobs
from server.openai.errors import APIError, internal_error
from server.openai.service import Prompt, Service


class ChoiceBuilder(ABC):
    """Turns the outputs of one request into choice ``index``; every call continues where the last one ended.

    ``whole`` and ``events`` raise APIError if the engine failed on the request.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.completion_tokens = self.cached_tokens = 0

    @abstractmethod
    def whole(self, outputs: list[RequestOutput]) -> BaseModel:
        """The choice, from all outputs of the request."""

    @abstractmethod
    def events(self, outputs: list[RequestOutput]) -> Iterator[BaseModel]:
        """What the outputs add to the choice, as a stream tells it."""

    def _take(self, outputs: list[RequestOutput]) -> tuple[str, dict[str, Any]]:
        """Count the outputs; their text, and index, finish_reason and stop_reason of the choice."""
        last = outputs[-1]
        if last.finish_reason in ("error", "abort"):
            raise APIError(400 if last.invalid else 500, last.error) if last.error else internal_error()
        self.cached_tokens = last.num_cached_tokens
        self.completion_tokens += sum(len(output.token_ids) for output in outputs)
        outcome = {"index": self.index, "finish_reason": last.finish_reason, "stop_reason": last.stop_reason}
        return "".join(output.text for output in outputs), outcome


class CompletionChoiceBuilder(ChoiceBuilder):
    """Choices of /v1/completions."""

    def __init__(self, index: int, prompt: Prompt, request: CompletionRequest, service: Service) -> None:
        super().__init__(index)
        self._token_text, self._logprobs = service.token_text, request.logprobs is not None
        self._offset = 0
        self._prompt = prompt.token_ids if request.echo else []
        self._prompt_texts = _prompt_texts(prompt, service.tokenizer) if request.echo else []
        self._pending = ("".join(self._prompt_texts) if prompt.text is None else prompt.text) if request.echo else ""

    def whole(self, outputs: list[RequestOutput]) -> Choice:
        text, outcome = self._take(outputs)
        text, self._pending = self._pending + text, ""
        return Choice(text=text, logprobs=self._report(outputs) if self._logprobs else None, **outcome)

    def events(self, outputs: list[RequestOutput]) -> Iterator[Choice]:
        yield self.whole(outputs)

    def _report(self, outputs: list[RequestOutput]) -> Logprobs:
        report = Logprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for output in outputs:
            if output.prompt_logprobs is not None:
                self._append(report, self._prompt, self._prompt_texts, output.prompt_logprobs)
            self._append(report, output.token_ids, output.token_texts, output.logprobs or [])
        return report

    def _append(self, report: Logprobs, ids: list[int], texts: list[str], values: "list[TokenLogprob] | list[TokenLogprob | None]") -> None:
        for token_id, text, value in zip(ids, texts, values, strict=True):
            report.text_offset.append(self._offset)
            report.tokens.append(text)
            report.token_logprobs.append(None if value is None else value.logprob)
            report.top_logprobs.append(None if value is None else self._alternatives(token_id, value))
            self._offset += len(text)

    def _alternatives(self, token_id: int, value: TokenLogprob) -> dict[str, float]:
        """Best first, the chosen token included. Of tokens with the same text the most likely one is kept."""
        alternatives: dict[str, float] = {}
        for alternative, logprob in (*value.top, (token_id, value.logprob)):
            text = self._token_text(alternative)
            alternatives[text] = max(logprob, alternatives.get(text, logprob))
        return alternatives


def _prompt_texts(prompt: Prompt, tokenizer: Tokenizer) -> list[str]:
    """The text that each prompt token completed."""
    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(tokenizer, token_id) or "" for token_id in prompt.token_ids]
    if prompt.text is not None and not prompt.text.startswith(texts[0]):
        texts[0] = ""  # a token that the tokenizer put before the text
    return texts
