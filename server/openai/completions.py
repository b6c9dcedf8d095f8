"""/v1/completions."""

from fastapi import APIRouter, Request, Response

from server.openai.body import JsonRoute
from server.openai.choices import CompletionChoiceBuilder
from server.openai.completion_protocol import Completion, CompletionRequest
from server.openai.errors import APIError
from server.openai.generation import ERRORS, Form, check_options, respond
from server.openai.service import CurrentService, RequestStack
from server.openai.structured import compile_grammar

FORM = Form("cmpl", Completion, "text_completion", Completion, "text_completion")

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", response_model=Completion, responses=ERRORS)
async def create_completion(body: CompletionRequest, http: Request, service: CurrentService, stack: RequestStack) -> Response:
    """Continue one or several prompts."""
    check_options(body, len(body.prompt), service)
    if body.best_of not in (None, body.n):
        raise APIError(400, f"best_of: only the value of n is supported, got {body.best_of} with n {body.n}.", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise APIError(400, "max_tokens: must be at least 1 unless echo is true.", param="max_tokens")
    await compile_grammar(body, service)
    prompts = await service.tokenize(body.prompt)
    builders = [CompletionChoiceBuilder(i, prompts[i // body.n], body, service) for i in range(len(prompts) * body.n)]
    return await respond(body, prompts, builders, FORM, service, http, stack)
