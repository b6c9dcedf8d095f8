"""Engine outputs as the choices of a chat completion, whole or as deltas."""

from collections.abc import Iterator
from typing import Any

from server.engine.types import RequestOutput, TokenLogprob
from server.openai.chat_protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    Delta,
    TokenChoice,
    TokenReport,
)
from server.openai.choices import ChoiceBuilder
from server.openai.service import Service


class ChatChoiceBuilder(ChoiceBuilder):
    """Choices of /v1/chat/completions."""

    def __init__(self, index: int, request: ChatRequest, service: Service) -> None:
        super().__init__(index)
        self._token_text, self._logprobs = service.token_text, request.logprobs
        self._begun = False

    def whole(self, outputs: list[RequestOutput]) -> ChatChoice:
        text, outcome = self._take(outputs)
        message = AssistantMessage(role="assistant", content=text, refusal=None)
        return ChatChoice(message=message, logprobs=self._report(outputs), **outcome)

    def events(self, outputs: list[RequestOutput]) -> Iterator[ChatChunkChoice]:
        """The role, then text, then the reason why it ended."""
        text, outcome = self._take(outputs)
        going_on: dict[str, Any] = {"index": self.index, "finish_reason": None, "stop_reason": None}
        if not self._begun:
            self._begun = True
            yield ChatChunkChoice(delta=Delta(role="assistant", content=""), logprobs=None, **going_on)
        report = self._report(outputs)
        if text or (report and report.content):
            yield ChatChunkChoice(delta=Delta(content=text), logprobs=report, **going_on)
        if outcome["finish_reason"]:
            yield ChatChunkChoice(delta=Delta(), logprobs=None, **outcome)

    def _report(self, outputs: list[RequestOutput]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        tokens = [
            self._token(text, value) for output in outputs for text, value in zip(output.token_texts, output.logprobs or [], strict=True)
        ]
        return ChatLogprobs(content=tokens, refusal=None)

    def _token(self, text: str, value: TokenLogprob) -> TokenReport:
        """A token that completed no text, such as the end of the sequence, is named by what it is alone."""
        return TokenReport(
            token=text or self._token_text(value.token_id),
            logprob=value.logprob,
            bytes=list(text.encode()),
            top_logprobs=[self._alternative(token_id, logprob) for token_id, logprob in value.top],
        )

    def _alternative(self, token_id: int, logprob: float) -> TokenChoice:
        text = self._token_text(token_id)
        return TokenChoice(token=text, logprob=logprob, bytes=list(text.encode()))
