"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, FailFast, Field

from server.openai.body import JsonRoute
from server.openai.chat_protocol import MAX_MESSAGES, Conversation, Message
from server.openai.chat_template import render
from server.openai.errors import APIError
from server.openai.generation import ERRORS
from server.openai.protocol import RequestBody
from server.openai.service import CurrentService

router = APIRouter(route_class=JsonRoute)


class TokenizeRequest(Conversation):
    """Either a prompt or messages."""

    prompt: str | None = None
    messages: list[Message] = Field([], min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = Field(None, description="True for a prompt, false for messages, whose template has them, by default.")
    return_token_strs: bool = False


class TokenizeResponse(BaseModel):
    """``token_strs``: the entries of the vocabulary, as they are spelt there."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], FailFast()]


class DetokenizeResponse(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What clients need of the tokenizer's configuration; special tokens have fields of their own, such as ``eos_token``."""

    model_config = {"extra": "allow", "protected_namespaces": ()}

    tokenizer_class: str
    chat_template: str | None
    vocab_size: int
    model_max_length: int


@router.post("/tokenize", responses=ERRORS)
async def tokenize(body: TokenizeRequest, service: CurrentService) -> TokenizeResponse:
    """The tokens of a prompt or of a conversation."""
    service.check_model(body.model)
    if (body.prompt is None) == (not body.messages):
        raise APIError(400, "prompt: exactly one of prompt and messages is expected.", param="prompt")
    text = await render(body, service) if body.prompt is None else body.prompt
    special = body.prompt is not None if body.add_special_tokens is None else body.add_special_tokens
    (prompt,) = await service.encode([text], special)
    ids = prompt.token_ids
    names = [str(service.tokenizer.id_to_token(token)) for token in ids] if body.return_token_strs else None
    return TokenizeResponse(count=len(ids), max_model_len=service.max_tokens, tokens=ids, token_strs=names)


@router.post("/detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeRequest, service: CurrentService) -> DetokenizeResponse:
    """The text of tokens, special ones included."""
    service.check_model(body.model)
    if any(token >= service.vocab_size for token in body.tokens):
        raise APIError(400, f"tokens: token ids must be below the vocabulary's {service.vocab_size}.", param="tokens")
    text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)


@router.get("/tokenizer_info")
async def tokenizer_info(service: CurrentService) -> TokenizerInfo:
    """Class, special tokens and chat template of the tokenizer."""
    special: dict[str, Any] = service.chat_tokenizer.special_tokens_map
    return TokenizerInfo(
        tokenizer_class=type(service.chat_tokenizer).__name__,
        chat_template=service.chat_template,
        vocab_size=service.vocab_size,
        model_max_length=service.max_tokens,
        **special,
    )
