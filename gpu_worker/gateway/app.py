"""The HTTP interface: routes, what each takes and gives, and nothing else. Its schema is at /openapi.json."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response

from common.metrics import exposition
from gpu_worker.gateway import errors, replies
from gpu_worker.gateway.caller import Caller
from gpu_worker.gateway.chats import Chats
from gpu_worker.gateway.completions import Completions
from gpu_worker.gateway.gateway import Gateway
from gpu_worker.gateway.middleware import HEALTH, Envelope
from gpu_worker.gateway.prompts import of_chat, of_completion
from gpu_worker.gateway.requests import ChatRequest, CompletionRequest
from gpu_worker.gateway.responding import AnswerResponse, StreamedResponse

_MODELS, _MODEL = "/v1/models", "/v1/models/{model_id:path}"
_COMPLETIONS, _CHATS = "/v1/completions", "/v1/chat/completions"
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}

router = APIRouter()


def make_app(gateway: Gateway) -> FastAPI:
    app = FastAPI(
        title="expert-serving gateway",
        description="OpenAI's endpoints for the model of one GPU worker.",
        docs_url=None,  # both would load scripts from elsewhere
        redoc_url=None,
        responses={"default": {"model": errors.ErrorReply, "description": "What went wrong"}},
    )
    app.state.gateway = gateway
    app.include_router(router)
    app.add_middleware(Envelope, gateway=gateway)
    errors.install(app)
    return app


@router.get(_MODELS, response_model=replies.ModelList)
async def list_models(request: Request) -> Response:
    """The one model that is served."""
    gateway, caller = _parties(request)
    name, _ = await gateway.model(caller)
    return _json(replies.ModelList(object="list", data=[_model(name, gateway)]))


@router.get(_MODEL, response_model=replies.Model)
async def get_model(model_id: str, request: Request) -> Response:
    gateway, caller = _parties(request)
    name, _ = await gateway.model(caller, model_id)
    return _json(_model(name, gateway))


@router.post(_COMPLETIONS, response_model=replies.Completion, responses={200: {"content": _STREAM}})
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue a prompt, or several."""
    gateway, caller = _parties(request)
    name, info = await gateway.model(caller, body.model)
    asked = of_completion(body, info, caller.usage)
    answers = Completions(body, len(asked.prompts), name, usage_follows=_include_usage(body))
    return _response(body, gateway, caller, _COMPLETIONS, asked, answers)


@router.post(_CHATS, response_model=replies.ChatCompletion, responses={200: {"content": _STREAM}})
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a chat, by the model's own template."""
    gateway, caller = _parties(request)
    name, info = await gateway.model(caller, body.model)
    asked = of_chat(body, info, caller.usage)
    answers = Chats(body, info, name, usage_follows=_include_usage(body))
    return _response(body, gateway, caller, _CHATS, asked, answers)


@router.get(HEALTH, responses={503: {"description": "Not now"}})
async def health(request: Request) -> Response:
    """Whether requests would be answered: the worker is there, has its model, and neither of both drains."""
    gateway, _ = _parties(request)
    ready = await gateway.ready()
    status = "serving" if ready else "draining" if gateway.draining else "unavailable"
    headers = {} if ready else {"Retry-After": errors.RETRY_AFTER}
    return JSONResponse({"status": status}, 200 if ready else 503, headers)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    gateway, _ = _parties(request)
    page, content_type = exposition(gateway.metrics.registry, request.headers.get("accept"))
    return Response(page, headers={"Content-Type": content_type})


def _parties(request: Request) -> tuple[Gateway, Caller]:
    return request.app.state.gateway, request.state.caller


def _response(body: CompletionRequest | ChatRequest, *args: Any) -> Response:
    if body.stream:
        return StreamedResponse(*args, include_usage=_include_usage(body))
    return AnswerResponse(*args)


def _include_usage(body: CompletionRequest | ChatRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _model(name: str, gateway: Gateway) -> replies.Model:
    return replies.Model(id=name, object="model", created=gateway.created, owned_by="expert-serving")


def _json(reply: replies.Reply) -> Response:
    return Response(reply.json_bytes(), media_type="application/json")
