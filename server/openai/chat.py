"""/v1/chat/completions."""

from fastapi import APIRouter, Request, Response

from server.openai.body import JsonRoute
from server.openai.chat_choices import ChatChoiceBuilder
from server.openai.chat_protocol import ChatCompletion, ChatCompletionChunk, ChatRequest
from server.openai.chat_template import render
from server.openai.errors import APIError
from server.openai.generation import ERRORS, Form, check_options, respond
from server.openai.service import CurrentService, RequestStack, Service
from server.openai.structured import compile_grammar

FORM = Form("chatcmpl", ChatCompletion, "chat.completion", ChatCompletionChunk, "chat.completion.chunk")

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
async def create_chat_completion(body: ChatRequest, http: Request, service: CurrentService, stack: RequestStack) -> Response:
    """Answer a conversation."""
    check_options(body, 1, service)
    if body.top_logprobs and not body.logprobs:
        raise APIError(400, "top_logprobs: only allowed when logprobs is true.", param="top_logprobs")
    _check_tools(body, service)
    await compile_grammar(body, service)
    text = await render(body, service)
    prompts = await service.encode([text], body.add_special_tokens)
    return await respond(body, prompts, [ChatChoiceBuilder(i, body, service) for i in range(body.n)], FORM, service, http, stack)


def _check_tools(body: ChatRequest, service: Service) -> None:
    """Refuse calls that nobody could read, or that the answer's form leaves no room for."""
    if body.calling == "none":
        return
    forms = {"response_format": body.response_format.type != "text", "structured_outputs": body.structured_outputs is not None}
    for field in (field for field, given in forms.items() if given):
        raise APIError(400, f"{field}: cannot be used together with tools, unless tool_choice is none.", param=field)
    if body.calling == "auto" and service.tool_call_parser is None:
        message = "tools: this server does not know how the model writes calls (its operator can say, by --tool-call-parser); "
        raise APIError(400, message + "tool_choice may be required or name a function.", param="tools")
    if body.calling == "auto" and "tools" not in (body.chat_template or service.chat_template or ""):
        raise APIError(400, "tools: the chat template does not tell the model of them.", param="tools")
