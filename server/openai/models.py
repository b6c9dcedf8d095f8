"""/v1/models."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from server.openai.errors import ErrorResponse
from server.openai.service import CurrentService, Service

router = APIRouter()


class ModelCard(BaseModel):
    """``max_model_len``: most tokens of prompt and completion together, as vLLM reports it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vsd-serve"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def _card(service: Service) -> ModelCard:
    return ModelCard(id=service.model_name, created=service.created, max_model_len=service.max_tokens)


@router.get("/v1/models")
async def list_models(service: CurrentService) -> ModelList:
    """The served model."""
    return ModelList(data=[_card(service)])


@router.get("/v1/models/{model_id:path}", responses={404: {"model": ErrorResponse}})
async def retrieve_model(model_id: str, service: CurrentService) -> ModelCard:
    """The served model, by its name."""
    service.check_model(model_id)
    return _card(service)
