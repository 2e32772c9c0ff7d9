"""What can be asked at which address."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edgekv.clock import MonotonicClock
from edgekv.errors import EdgeKVError
from edgekv.runtime import App, Runtime
from edgekv.server import anthropic, native, ollama
from edgekv.server.access import Identity
from edgekv.server.answering import Answering, Json, fields_of, read, said_aside
from edgekv.server.dialect import About, Dialect
from edgekv.server.faults import fault_of
from edgekv.server.fields import Fault, FaultKind
from edgekv.server.metrics import Metrics
from edgekv.server.model import ServedModel
from edgekv.server.openai_chat import ChatCompletions
from edgekv.server.openai_errors import openai_error
from edgekv.server.openai_text import TextCompletions
from edgekv.server.openapi import document
from edgekv.server.page import Page
from edgekv.server.responses import Responses
from edgekv.server.visitors import Visitors

Handler = Callable[[Request], Awaitable[Response]]

NO_EMBEDDINGS = ("/api/embed", "/api/embeddings", "/v1/embeddings")


def say(fault: Fault, path: str) -> dict[str, Any]:
    """A fault as the API of a path says it."""
    if path.startswith(native.PREFIX):
        return native.say(fault)
    if path.startswith("/v1/messages"):
        return anthropic.Messages().error(fault)
    return {"error": fault.message} if path.startswith("/api/") else openai_error(fault)


def say_bytes(fault: Fault, path: str) -> bytes:
    """The same as JSON."""
    return json.dumps(say(fault, path), ensure_ascii=False).encode("utf-8", "replace")


def fault_response(fault: Fault, path: str) -> Response:
    """The answer that is none."""
    headers = {} if fault.retry_after_s is None else {"retry-after": str(fault.retry_after_s)}
    return Json(say(fault, path), status_code=fault.status, headers=headers)


class Service:
    """The model behind HTTP. Owned by the server's loop."""

    def __init__(
        self,
        model: ServedModel,
        *,
        metrics: Metrics,
        heartbeat_s: float,
        origin: str | None = None,
    ) -> None:
        """`origin` is where browsers find it, as "http://127.0.0.1:8642"."""
        self._model = model
        self._metrics = metrics
        self._answering = Answering(metrics, heartbeat_s)
        self._native = native.Native(model, self._app, metrics, heartbeat_s)
        self._page = Page(model, metrics, Visitors(MonotonicClock()), origin)
        self._started_s = int(time.time())

    def application(self) -> Starlette:
        """All routes, as an ASGI application."""
        generating: dict[str, Dialect] = {
            "/v1/chat/completions": ChatCompletions(),
            "/v1/completions": TextCompletions(),
            "/v1/responses": Responses(),
            "/v1/messages": anthropic.Messages(),
            "/api/chat": ollama.OllamaChat(),
            "/api/generate": ollama.OllamaGenerate(),
        }
        routes = [Route(p, self._generating(d), methods=["POST"]) for p, d in generating.items()]
        routes += [Route(p, self._no_embeddings, methods=["POST"]) for p in NO_EMBEDDINGS]
        more: dict[str, tuple[Handler, str]] = {
            "/v1/messages/count_tokens": (self._count_tokens, "POST"),
            "/v1/models": (self._models, "GET"),
            "/v1/models/{name:path}": (self._one_model, "GET"),
            "/api/tags": (self._tags, "GET"),
            "/api/version": (self._version, "GET"),
            "/api/ps": (self._ps, "GET"),
            "/api/show": (self._show, "POST"),
            "/healthz": (self._healthz, "GET"),
            "/metrics": (self._metrics_page, "GET"),
            "/edgekv/status": (self._status, "GET"),
            "/openapi.json": (self._openapi, "GET"),
        }
        routes += [Route(p, run, methods=[method]) for p, (run, method) in more.items()]
        routes += self._native.routes()
        routes += self._page.routes()
        handlers: Any = {
            Fault: self._say_fault,
            EdgeKVError: self._say_error,
            HTTPException: self._say_http,
            Exception: self._say_bug,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    # --- generating ---

    def _generating(self, dialect: Dialect) -> Handler:
        async def answer(request: Request) -> Response:
            fields = await fields_of(request)
            aside = said_aside(request, fields)
            if isinstance(dialect, ollama.OllamaChat | ollama.OllamaGenerate):
                about = About(request_id="0" * 32, created_s=int(time.time()))
                loaded = dialect.loaded(fields, about)
                if loaded is not None:
                    await self._model.card()
                    return Json(loaded)
            asked = await read(request, dialect, fields, aside)
            return await self._answering.answer(request, self._model, self._app, dialect, asked)

        return answer

    def _app(self, runtime: Runtime, request: Request) -> App:
        """The app that asks, with the terms that its key gives it."""
        identity = request.scope["state"]["identity"]
        assert isinstance(identity, Identity), "the guard lets nobody else pass"
        return runtime.app(identity.app, **identity.terms)

    async def _count_tokens(self, request: Request) -> Response:
        asked = anthropic.parse_count(await fields_of(request))
        async with self._model.runtime() as runtime:
            num = await asyncio.to_thread(runtime.count_tokens, asked)
        return Json(anthropic.count_answer(num))

    async def _no_embeddings(self, request: Request) -> Response:
        return fault_response(ollama.no_embeddings(), request.url.path)

    # --- about models ---

    async def _models(self, _request: Request) -> Response:
        return Json({"object": "list", "data": [await self._model_entry()]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model.name:
            raise Fault(
                "not_found",
                f"there is no model {name[:200]!r} here; {self._model.name} is served",
                code="model_not_found",
            )
        return Json(await self._model_entry())

    async def _model_entry(self) -> dict[str, Any]:
        card = await self._model.card()
        return {
            "id": card.name,
            "object": "model",
            "created": card.modified_s,
            "owned_by": "edgekv",
            "context_length": card.context_max,
            "max_model_len": card.context_max,
            "type": "model",  # Anthropic's list has these two
            "display_name": card.name,
        }

    async def _tags(self, _request: Request) -> Response:
        return Json(ollama.tags([await self._model.card()]))

    async def _version(self, _request: Request) -> Response:
        return Json(ollama.version())

    async def _ps(self, _request: Request) -> Response:
        loaded = [await self._model.card()] if self._model.loaded is not None else []
        expires_s = self._model.unloads_s
        return Json(ollama.ps(loaded, None if expires_s is None else int(expires_s)))

    async def _show(self, request: Request) -> Response:
        ollama.show_name(await fields_of(request))
        return Json(ollama.show(await self._model.card()))

    # --- about the daemon ---

    async def _healthz(self, _request: Request) -> Response:
        return Json({"status": "ok", "model": self._model.name})

    async def _metrics_page(self, request: Request) -> Response:
        text = await asyncio.to_thread(self._metrics.text, self._model.loaded, _seen_app(request))
        return PlainTextResponse(text, media_type=Metrics.media_type)

    async def _status(self, request: Request) -> Response:
        """What `edgekv ps` shows."""
        app = _seen_app(request)
        status = await asyncio.to_thread(self._metrics.status, self._model.loaded, app)
        return Json({"model": self._model.name, "started_s": self._started_s, **status})

    async def _openapi(self, _request: Request) -> Response:
        return Json(document())

    # --- what goes wrong ---

    async def _say_fault(self, request: Request, fault: Fault) -> Response:
        return fault_response(fault, request.url.path)

    async def _say_error(self, request: Request, error: EdgeKVError) -> Response:
        return fault_response(fault_of(error), request.url.path)

    async def _say_http(self, request: Request, error: HTTPException) -> Response:
        kind: FaultKind = "not_found" if error.status_code == 404 else "invalid"
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = fault_response(Fault(kind, message), request.url.path)
        response.status_code = error.status_code
        response.headers.update(error.headers or {})  # as which methods there are
        return response

    async def _say_bug(self, request: Request, error: Exception) -> Response:
        fault = Fault("internal", f"a bug in edgekv: {type(error).__name__}")
        return fault_response(fault, request.url.path)


def _seen_app(request: Request) -> str | None:
    """The one app whose figures may be seen; None where it is all: at the socket."""
    identity = request.scope["state"]["identity"]
    assert isinstance(identity, Identity), "the guard lets nobody else pass"
    return None if identity.is_user else identity.app
