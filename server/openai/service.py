"""What the routes share: the engine, its limits and names."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, NamedTuple

from fastapi import Depends, Request
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from server.engine.async_engine import AsyncEngine
from server.engine.grammar import Grammars
from server.openai.errors import APIError, context_length_error
from server.openai.tool_parsers import ToolFormat


class Prompt(NamedTuple):
    """``text`` None: the client sent token ids."""

    text: str | None
    token_ids: list[int]


@dataclass
class Service:
    """One served model. ``num_spec_tokens``: drafted tokens of a full tree. ``created``: Unix time.

    ``max_logprobs``: most alternatives that a request may ask for. ``chat_template`` None: the model has none.
    ``tool_call_parser``: how the model writes calls of its own accord, None if that is not known.
    """

    engine: AsyncEngine
    model_name: str
    num_spec_tokens: int
    created: int
    max_logprobs: int
    trust_request_chat_template: bool
    tool_call_parser: ToolFormat | None
    tokenizer: Tokenizer = field(init=False)
    chat_tokenizer: PreTrainedTokenizerBase = field(init=False)
    chat_template: str | None = field(init=False)
    vocab_size: int = field(init=False)
    max_tokens: int = field(init=False)  # of prompt and completion together
    max_characters: int = field(init=False)  # that max_tokens tokens can stand for
    speculative: bool = field(init=False)
    token_text: Callable[[int], str] = field(init=False)
    grammars: Grammars = field(init=False)
    compilers: ThreadPoolExecutor = field(init=False)  # of their own, so that hard grammars hold up no tokenizing

    def __post_init__(self) -> None:
        engine = self.engine.engine
        self.chat_tokenizer = engine.tokenizer
        self.chat_template = _chat_template(engine.tokenizer)
        self.tokenizer = engine.tokenizer.backend_tokenizer
        self.tokenizer.no_truncation()  # set here, once: changing a tokenizer that other threads use fails
        self.tokenizer.no_padding()
        self.token_text = token_decoder(self.tokenizer)
        self.grammars, self.compilers = engine.grammars, ThreadPoolExecutor(2, "grammar")
        self.vocab_size, self.speculative = engine.vocab_size, engine.speculative
        self.max_tokens = min(engine.max_model_len, engine.max_request_tokens)
        self.max_characters = self.max_tokens * max(map(len, self.tokenizer.get_vocab()))

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.model_name):
            raise APIError(404, f"The model `{name}` does not exist.", param="model", code="model_not_found")

    async def tokenize(self, prompts: list[str] | list[list[int]]) -> list[Prompt]:
        """Texts are encoded, ids are checked against the vocabulary."""
        encoded = await self.encode([prompt for prompt in prompts if isinstance(prompt, str)])
        encoded += [Prompt(None, prompt) for prompt in prompts if not isinstance(prompt, str)]
        for prompt in encoded:
            if not prompt.token_ids:
                raise APIError(400, "The prompt has no tokens.", param="prompt")
            if prompt.text is None and max(prompt.token_ids) >= self.vocab_size:
                raise APIError(400, f"prompt: token ids must be below the vocabulary's {self.vocab_size}.", param="prompt")
        return encoded

    async def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[Prompt]:
        """Tokens of texts, encoded in a thread; those that cannot fit the context are refused before."""
        for text in texts:
            if len(text) > self.max_characters:
                raise context_length_error(self.max_tokens, f"However, your prompt has {len(text)} characters. Shorten it.")
        if not texts:
            return []
        encodings = await asyncio.to_thread(self.tokenizer.encode_batch_fast, texts, add_special_tokens=add_special_tokens)
        return [Prompt(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    def completion_limit(self, prompt: Prompt, max_tokens: int | None) -> int:
        """Most tokens that may follow ``prompt``: ``max_tokens``, or what is left of the context, at least one."""
        left = self.max_tokens - len(prompt.token_ids)
        limit = max(1, left) if max_tokens is None else max_tokens
        if limit > left:
            raise context_length_error(
                self.max_tokens,
                f"However, you requested {len(prompt.token_ids) + limit} tokens ({len(prompt.token_ids)} in the prompt, "
                f"{limit} for the completion). Shorten the prompt or the completion.",
            )
        return limit


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # there is none, or several and none is the default
        return None


def token_decoder(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Text of a single token, remembered: the keys of top_logprobs."""

    @cache
    def decode(token_id: int) -> str:
        return str(tokenizer.decode([token_id], skip_special_tokens=False))

    return decode


def _service(request: Request) -> Service:
    service: Service | None = request.app.state.life.service
    assert service is not None, "the gate lets nobody in before"
    return service


async def _request_stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


CurrentService = Annotated[Service, Depends(_service)]
# Left when the response has been sent or its client is gone, whichever route and whatever error.
RequestStack = Annotated[AsyncExitStack, Depends(_request_stack)]
