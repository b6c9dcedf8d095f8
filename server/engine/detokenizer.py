"""Token ids to text, incrementally, with stop strings."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_PROMPT_TAIL = 8  # prompt tokens that set the decoder's state: a leading space is only kept after other text


class Detokenizer:
    """Text of one request as its tokens arrive. Text that could be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], stop: tuple[str, ...], include_stop: bool) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=prompt_ids[-_PROMPT_TAIL:], skip_special_tokens=True)
        self._stop, self._include_stop = stop, include_stop
        self._longest = max(map(len, stop), default=0)
        self._text = ""
        self._shown = 0

    def add(self, token_id: int, may_stop: bool, ends: bool) -> tuple[str, str | None]:
        """Add one token; return the text it completed, and the stop string it completed, if any.

        ``may_stop`` False (fewer than min_tokens yet) looks for no stop string. ``ends``: this is a stop token, shown as stop strings are.
        """
        piece = self._stream.step(self._tokenizer, token_id) or ""
        if ends and not self._include_stop:
            return piece, None
        before = len(self._text)
        self._text += piece
        if piece and may_stop:
            found = [(self._text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stop]
            found = [(index, stop) for index, stop in found if index >= 0]
            if found:
                index, stop = min(found)
                self._text = self._text[: index + len(stop) * self._include_stop]
                return piece, stop
        return piece, None

    def show(self, finished: bool) -> str:
        """The text that may be shown now and was not shown before."""
        end = len(self._text) if finished else len(self._text) - max(0, self._longest - 1)
        text = self._text[self._shown : max(end, self._shown)]
        self._shown += len(text)
        return text
