"""/v1/chat/completions."""

from fastapi import APIRouter, Request, Response

from server.openai.chat_choices import ChatChoiceBuilder
from server.openai.chat_protocol import ChatCompletion, ChatCompletionChunk, ChatRequest
from server.openai.chat_template import render
from server.openai.errors import APIError
from server.openai.generation import ERRORS, Form, check_options, respond
from server.openai.service import CurrentService, RequestStack
from server.openai.structured import compile_grammar

FORM = Form("chatcmpl", ChatCompletion, "chat.completion", ChatCompletionChunk, "chat.completion.chunk")

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
async def create_chat_completion(body: ChatRequest, http: Request, service: CurrentService, stack: RequestStack) -> Response:
    """Answer a conversation."""
    check_options(body, 1, service)
    if body.top_logprobs and not body.logprobs:
        raise APIError(400, "top_logprobs: only allowed when logprobs is true.", param="top_logprobs")
    await compile_grammar(body, service)
    text = await render(body, service)
    prompts = await service.encode([text], body.add_special_tokens)
    return await respond(body, prompts, [ChatChoiceBuilder(i, body, service) for i in range(body.n)], FORM, service, http, stack)
