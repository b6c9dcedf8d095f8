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
from server.openai.tool_parsers import Arguments, CallStart, Content, Piece
from server.openai.tools import Call, CallDelta, CalledFunction, FunctionDelta, new_call_id, parser_for


class ChatChoiceBuilder(ChoiceBuilder):
    """Choices of /v1/chat/completions."""

    def __init__(self, index: int, request: ChatRequest, service: Service) -> None:
        super().__init__(index)
        self._token_text, self._logprobs = service.token_text, request.logprobs
        self._begun = False
        self._parser = parser_for(request.calling, service.tool_call_parser)
        self._most_calls = None if request.parallel_tool_calls else 1
        self._calls = self._told = 0  # those of the text, and those in events

    def whole(self, outputs: list[RequestOutput]) -> ChatChoice:
        text, outcome = self._take(outputs)
        content, calls = "", list[Call]()
        for piece in self._pieces(text, outcome):
            match piece:
                case Content(said):
                    content += said
                case CallStart(name):
                    calls.append(Call(id=new_call_id(), type="function", function=CalledFunction(name=name, arguments="")))
                case Arguments(more):
                    calls[-1].function.arguments += more
        message = AssistantMessage(role="assistant", content=None if calls and not content else content, refusal=None)
        if calls:
            message.tool_calls = calls
        return ChatChoice(message=message, logprobs=self._report(outputs), **outcome)

    def events(self, outputs: list[RequestOutput]) -> Iterator[ChatChunkChoice]:
        """The role, then text and calls, then the reason why it ended."""
        text, outcome = self._take(outputs)
        going_on: dict[str, Any] = {"index": self.index, "finish_reason": None, "stop_reason": None}
        if not self._begun:
            self._begun = True
            yield ChatChunkChoice(delta=Delta(role="assistant", content=""), logprobs=None, **going_on)
        report = self._report(outputs)
        deltas = [self._delta(piece) for piece in self._pieces(text, outcome)]
        if not deltas and report and report.content:
            deltas = [Delta(content="")]
        for delta in deltas:
            yield ChatChunkChoice(delta=delta, logprobs=report, **going_on)
            report = None  # told with the first
        if outcome["finish_reason"]:
            yield ChatChunkChoice(delta=Delta(), logprobs=None, **outcome)

    def _pieces(self, text: str, outcome: dict[str, Any]) -> list[Piece]:
        """What the text adds to content and calls; an answer that stopped with calls has that as its reason."""
        if self._parser is None:
            return [Content(text)] if text else []
        pieces = self._parser.feed(text)
        if outcome["finish_reason"]:
            pieces += self._parser.finish()
        kept = [piece for piece in pieces if self._counts(piece)]
        if self._calls and outcome["finish_reason"] == "stop":
            outcome["finish_reason"] = "tool_calls"
        return kept

    def _counts(self, piece: Piece) -> bool:
        """False for calls beyond the most that were asked for."""
        self._calls += isinstance(piece, CallStart)
        return isinstance(piece, Content) or self._most_calls is None or self._calls <= self._most_calls

    def _delta(self, piece: Piece) -> Delta:
        match piece:
            case Content(text):
                return Delta(content=text)
            case CallStart(name):
                self._told += 1
                function = FunctionDelta(name=name, arguments="")
                return Delta(tool_calls=[CallDelta(index=self._told - 1, id=new_call_id(), type="function", function=function)])
            case Arguments(text):
                return Delta(tool_calls=[CallDelta(index=self._told - 1, function=FunctionDelta(arguments=text))])

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
