"""Engine outputs as the choices of a completion, whole or in parts."""

from collections.abc import Callable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from server.engine.types import RequestOutput, TokenLogprob
from server.openai.errors import APIError, internal_error
from server.openai.protocol import Choice, CompletionRequest, Logprobs
from server.openai.service import Prompt


class ChoiceBuilder:
    """Turns the outputs of one request into choice ``index``; every call continues where the last one ended."""

    def __init__(
        self, index: int, prompt: Prompt, request: CompletionRequest, tokenizer: Tokenizer, token_text: Callable[[int], str]
    ) -> None:
        self.completion_tokens = self.cached_tokens = 0
        self._index, self._token_text = index, token_text
        self._logprobs, self._echo_only = request.logprobs is not None, request.echo and request.max_tokens == 0
        self._offset = 0
        self._prompt = prompt.token_ids if request.echo else []
        self._prompt_texts = _prompt_texts(prompt, tokenizer) if request.echo else []
        self._pending = ("".join(self._prompt_texts) if prompt.text is None else prompt.text) if request.echo else ""

    def build(self, outputs: list[RequestOutput]) -> Choice:
        """Raises APIError if the engine failed on the request."""
        last = outputs[-1]
        if last.finish_reason in ("error", "abort"):
            raise APIError(500, last.error) if last.error else internal_error()
        self.cached_tokens = last.num_cached_tokens
        text, self._pending = self._pending, ""
        logprobs = Logprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[]) if self._logprobs else None
        for output in outputs:
            if logprobs is not None and output.prompt_logprobs is not None:
                self._append(logprobs, self._prompt, self._prompt_texts, output.prompt_logprobs)
            if self._echo_only:
                continue
            text += output.text
            self.completion_tokens += len(output.token_ids)
            if logprobs is not None:
                self._append(logprobs, output.token_ids, output.token_texts, output.logprobs or [])
        reason = last.finish_reason if last.finish_reason in ("stop", "length") else None
        if self._echo_only and reason:
            return Choice(index=self._index, text=text, logprobs=logprobs, finish_reason="length", stop_reason=None)
        return Choice(index=self._index, text=text, logprobs=logprobs, finish_reason=reason, stop_reason=last.stop_reason)

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
