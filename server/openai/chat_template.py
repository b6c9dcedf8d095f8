"""Conversations as the text of a prompt, by the model's chat template."""

import asyncio
import ctypes
import inspect
import threading
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
                tools=[tool.model_dump(exclude_unset=True) for tool in body.offered_tools] or None,
                tokenize=False,
                **body.chat_template_kwargs,
            )
    except _Overdue:
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


class _Overdue(BaseException):
    """No Exception, so that nothing between the template and here takes it for one."""


class _TimeLimit:
    """Raises _Overdue in the thread that entered, at its next Python instruction once ``seconds`` are over.

    A thread cannot be ended from outside, and a template could loop without end. Tracing would slow every thread down.
    """

    def __init__(self, seconds: float) -> None:
        self._lock = threading.Lock()
        self._open = True
        self._thread = ctypes.c_ulong(threading.get_ident())
        self._timer = threading.Timer(seconds, self._interrupt)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open = False
        self._timer.cancel()  # what was raised at the last moment arrives here at the latest

    def _interrupt(self) -> None:
        with self._lock:
            if self._open:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, ctypes.py_object(_Overdue))
