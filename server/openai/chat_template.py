"""Conversations as the text of a prompt, by the model's chat template."""

import asyncio
import inspect
import sys
import time
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from server.openai.chat_protocol import Conversation
from server.openai.errors import APIError
from server.openai.protocol import is_text
from server.openai.service import Service

RENDER_SECONDS = 5.0
MAX_TEMPLATE_CHARACTERS = 2**17
# A variable of such a name would change what the tokenizer does instead of what the template reads.
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages", "conversations"}


async def render(body: Conversation, service: Service) -> str:
    """Text of the prompt, at most what the context can hold; APIError when the template is missing, refused or fails."""
    template = _template(body, service)
    if clash := sorted(RESERVED & set(body.chat_template_kwargs)):
        raise APIError(400, f"chat_template_kwargs: {clash[0]} is a name that clients cannot set.", param="chat_template_kwargs")
    return await asyncio.to_thread(_render, service.chat_tokenizer, template, body)


def _template(body: Conversation, service: Service) -> str:
    if body.chat_template is not None:
        if not service.trust_request_chat_template:
            message = "chat_template: this server takes no templates from requests (its operator can, by --trust-request-chat-template)."
            raise APIError(400, message, param="chat_template")
        if len(body.chat_template) > MAX_TEMPLATE_CHARACTERS:
            raise APIError(400, f"chat_template: must have at most {MAX_TEMPLATE_CHARACTERS} characters.", param="chat_template")
        return body.chat_template
    if service.chat_template is None:
        message = f"The model `{service.model_name}` has no chat template, so it cannot answer messages; use /v1/completions."
        raise APIError(400, message, param="messages")
    return service.chat_template


def _render(tokenizer: Any, template: str, body: Conversation) -> str:
    try:
        with _TimeLimit(RENDER_SECONDS):
            text = tokenizer.apply_chat_template(
                _messages(body, template),
                chat_template=template,
                add_generation_prompt=body.opens_turn,
                continue_final_message=body.continue_final_message,
                tokenize=False,
                **body.chat_template_kwargs,
            )
    except TimeoutError:
        raise APIError(400, f"messages: the chat template took longer than {RENDER_SECONDS:g} seconds.", param="messages") from None
    except TemplateError as error:  # often the template's own words, on which roles it takes
        raise APIError(400, f"messages: the chat template refuses them: {str(error)[:500]}", param="messages") from error
    except Exception as error:  # templates may do anything with what they are given
        raise APIError(400, f"messages: the chat template fails on them ({type(error).__name__}).", param="messages") from error
    if not is_text(text):
        raise APIError(400, "messages: they hold half of a surrogate pair, which is no character.", param="messages")
    if not text:
        raise APIError(400, "messages: the chat template makes an empty prompt of them.", param="messages")
    return str(text)


def _messages(body: Conversation, template: str) -> list[dict[str, Any]]:
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    if "developer" not in template:  # the newer name of the same role
        for message in messages:
            message["role"] = "system" if message["role"] == "developer" else message["role"]
    return messages


class _TimeLimit:
    """Raises TimeoutError in this thread once ``seconds`` are over, at the next line or call of Python code.

    A thread cannot be ended from outside, and a template could loop without end.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._deadline, self._before = time.monotonic() + self._seconds, sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > self._deadline:
            raise TimeoutError
        return self._trace if frame.f_code.co_filename == "<template>" else None
