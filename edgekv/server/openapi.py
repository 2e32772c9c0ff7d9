"""What the daemon takes and gives, as the OpenAPI document that `GET /openapi.json` answers. Pure.

The page and edgekv's own protocol (`native`) are private, and not in it. Of answers it has what
clients read; of the pieces of streams only what they are.
"""

from typing import Any, get_args

from edgekv import __version__
from edgekv.chat.events import EndReason
from edgekv.config import PREFILL_MODES, PRIORITIES
from edgekv.server import anthropic, ollama
from edgekv.server.access import AGENT_HEADER, APP_HEADER, PUBLIC, SESSION_HEADERS
from edgekv.server.fields import STATUS
from edgekv.server.openapi_requests import (
    CHAT,
    COUNT,
    COUNT_TOKENS,
    GENERATE,
    MESSAGES,
    OLLAMA_CHAT,
    RESPONSE,
    SHOW,
    SOME_OBJECT,
    TEXT,
    TEXT_COMPLETION,
    Schema,
    list_of,
    object_of,
    one_of,
    or_null,
)

EVENTS, LINES = "text/event-stream", ollama.OllamaChat.media_type
_STREAMS = {EVENTS: object_of({"data": TEXT}, event=TEXT), LINES: TEXT}  # of each event; of all

# --- answers ---

_ENDS = one_of(*(reason for reason in get_args(EndReason) if reason != "cancelled"))
_USAGE = object_of(
    {
        **{"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
        "prompt_tokens_details": object_of({"cached_tokens": COUNT}),
        "completion_tokens_details": object_of({"reasoning_tokens": COUNT}),
    }
)
_OF_OPENAI = {"id": TEXT, "created": COUNT, "model": TEXT, "usage": _USAGE, "edgekv": SOME_OBJECT}
_TOOL_CALL = object_of(
    {
        **{"id": TEXT, "type": one_of("function")},
        "function": object_of({"name": TEXT, "arguments": TEXT}),
    }
)
_CHOICE = {"index": COUNT, "finish_reason": _ENDS, "logprobs": or_null(SOME_OBJECT)}
_CHAT_CHOICE = {
    **_CHOICE,
    "message": object_of(
        {"role": one_of("assistant"), "content": or_null(TEXT)},
        reasoning_content=TEXT,
        tool_calls=list_of(_TOOL_CALL),
    ),
}
_MODEL = object_of(
    {
        **{"id": TEXT, "object": one_of("model"), "created": COUNT, "owned_by": TEXT},
        **{"context_length": COUNT, "max_model_len": COUNT, "type": one_of("model")},
        "display_name": TEXT,
    }
)
_OPENAI_ANSWERS = {
    "/v1/chat/completions": object_of(
        {
            "object": one_of("chat.completion"),
            **_OF_OPENAI,
            "choices": list_of(object_of(_CHAT_CHOICE), minItems=1),
        }
    ),
    "/v1/completions": object_of(
        {
            "object": one_of("text_completion"),
            **_OF_OPENAI,
            "choices": list_of(object_of({**_CHOICE, "text": TEXT}), minItems=1),
        }
    ),
    "/v1/responses": object_of(
        {
            **{"id": TEXT, "object": one_of("response"), "created_at": COUNT, "model": TEXT},
            "status": one_of("completed", "incomplete"),
            "output": list_of(
                object_of(
                    {
                        "id": TEXT,
                        "type": one_of("message", "reasoning", "function_call", "custom_tool_call"),
                        "status": one_of("completed", "incomplete"),
                    }
                ),
                minItems=1,
            ),
            "usage": object_of(
                {"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT}
            ),
            "metadata": {"type": "object", "additionalProperties": TEXT},
            "edgekv": SOME_OBJECT,
        }
    ),
}
_MESSAGE = object_of(
    {
        **{"id": TEXT, "type": one_of("message"), "role": one_of("assistant"), "model": TEXT},
        "content": list_of(object_of({"type": one_of("text", "thinking", "tool_use")})),
        "stop_reason": one_of("end_turn", "max_tokens", "tool_use", "stop_sequence"),
        "stop_sequence": or_null(TEXT),
        "usage": object_of(
            {"input_tokens": COUNT, "cache_read_input_tokens": COUNT, "output_tokens": COUNT}
        ),
        "edgekv": SOME_OBJECT,
    }
)
_OLLAMA_END = {
    **{"model": TEXT, "created_at": TEXT, "done": one_of(True)},
    "done_reason": one_of("stop", "length", "load"),
}
_OLLAMA_FIGURES = {
    **{"total_duration": COUNT, "load_duration": COUNT, "prompt_eval_count": COUNT},
    **{"prompt_eval_duration": COUNT, "eval_count": COUNT, "eval_duration": COUNT},
    **{"edgekv": SOME_OBJECT, "logprobs": list_of(SOME_OBJECT)},
}
_OLLAMA_CALL = object_of({"function": object_of({"name": TEXT, "arguments": SOME_OBJECT})})
_OLLAMA_MESSAGE = object_of(
    {"role": one_of("assistant"), "content": TEXT},
    thinking=TEXT,
    tool_calls=list_of(_OLLAMA_CALL),
)
_LISTED = object_of(
    {"name": TEXT, "model": TEXT, "size": COUNT, "digest": TEXT, "details": SOME_OBJECT}
)
_SHOWN = object_of(
    {
        **{"details": SOME_OBJECT, "model_info": SOME_OBJECT, "capabilities": list_of(TEXT)},
        "modified_at": TEXT,
    }
)

# --- errors ---

_ERRORS = {
    "OpenAIError": object_of(
        {
            "error": object_of(
                {"message": TEXT, "type": TEXT, "param": or_null(TEXT), "code": or_null(TEXT)}
            )
        }
    ),
    "AnthropicError": object_of(
        {
            "type": one_of("error"),
            "error": object_of(
                {"type": one_of(*sorted({*anthropic.ERRORS.values()})), "message": TEXT},
                details=object_of({"error_code": TEXT}),
            ),
        }
    ),
    "OllamaError": object_of({"error": TEXT}),
    "EdgeKVError": object_of({"error": object_of({"type": TEXT, "message": TEXT})}),
}
_SAID = {
    400: "What was asked is not what can be answered: the message names the field.",
    401: "A key is missing or not known.",
    403: "A web page asks.",
    404: "There is no such model.",
    413: "The body or the head is too large.",
    429: "Too much at once: of this app, or of all.",
    500: "A bug in edgekv.",
    503: "The daemon or its model ends.",
}


def _error_of(path: str) -> str:
    """The shape in which a path's errors are said."""
    for prefix, name in (
        ("/api/", "Ollama"),
        ("/v1/messages", "Anthropic"),
        ("/edgekv/", "EdgeKV"),
    ):
        if path.startswith(prefix):
            return f"{name}Error"
    return "OpenAIError"


def _errors(path: str, statuses: set[int]) -> Schema:
    shape = {"schema": {"$ref": f"#/components/schemas/{_error_of(path)}"}}
    errors = {}
    for status in sorted(statuses):
        said: Schema = {"description": _SAID[status], "content": {"application/json": shape}}
        if status == STATUS["overloaded"]:
            said["headers"] = {"Retry-After": {"required": True, "schema": COUNT}}
        errors[str(status)] = said
    return errors


# --- the document ---

_HEADERS: list[Schema] = [
    *(
        {"name": name, "in": "header", "schema": TEXT, "description": "Names the conversation."}
        for name in SESSION_HEADERS
    ),
    {
        **{"name": AGENT_HEADER, "in": "header", "schema": TEXT},
        "description": "Which of a client's agents asks, each in a conversation of its own.",
    },
    {
        **{"name": "x-edgekv-priority", "in": "header", "schema": one_of(*PRIORITIES, "")},
        "description": "Of this request; else that of its app.",
    },
    {
        **{"name": "x-edgekv-prefill", "in": "header", "schema": one_of(*PREFILL_MODES, "")},
        "description": "Whether the prompt's KV may be predicted; else as its app or model has it.",
    },
]
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An app's key."},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."},
    "socket": {
        **{"type": "apiKey", "in": "header", "name": APP_HEADER},
        "description": "At the Unix socket, where no key is needed: which app asks.",
    },
}


def _get(summary: str, answer: Schema, media_type: str = "application/json") -> Schema:
    answered = {"description": summary, "content": {media_type: {"schema": answer}}}
    return {"get": {"summary": summary, "responses": {"200": answered}}}


def _post(summary: str, asked: Schema, answer: Schema, stream: str = "") -> Schema:
    """What generates has a type of streams, and is told by headers, too."""
    content = {"application/json": {"schema": answer}}
    operation: Schema = {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": asked}}},
        "responses": {"200": {"description": "The answer.", "content": content}},
    }
    if stream:
        content[stream] = {"schema": _STREAMS[stream]}
        operation["parameters"] = _HEADERS
    return {"post": operation}


def _no_embeddings() -> Schema:
    return {"post": {"summary": ollama.no_embeddings().message, "responses": {}}}


def _name_in_path(item: Schema) -> Schema:
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    return {**item, "parameters": [name]}


def _generating() -> Schema:
    answers = _OPENAI_ANSWERS
    return {
        "/v1/chat/completions": _post(
            "OpenAI: a conversation is answered.", CHAT, answers["/v1/chat/completions"], EVENTS
        ),
        "/v1/completions": _post(
            "OpenAI: a text is continued.", TEXT_COMPLETION, answers["/v1/completions"], EVENTS
        ),
        "/v1/responses": _post(
            "OpenAI: a conversation is answered; nothing is kept.",
            *(RESPONSE, answers["/v1/responses"], EVENTS),
        ),
        "/v1/messages": _post("Anthropic: a conversation is answered.", MESSAGES, _MESSAGE, EVENTS),
        "/api/chat": _post(
            "Ollama: a conversation is answered.",
            OLLAMA_CHAT,
            object_of({**_OLLAMA_END, "message": _OLLAMA_MESSAGE}, **_OLLAMA_FIGURES),
            LINES,
        ),
        "/api/generate": _post(
            "Ollama: a text is answered, or continued if it is raw.",
            GENERATE,
            object_of({**_OLLAMA_END, "response": TEXT}, thinking=TEXT, **_OLLAMA_FIGURES),
            LINES,
        ),
    }


def _about_models() -> Schema:
    models = object_of({"object": one_of("list"), "data": list_of(_MODEL)})
    listed = object_of({"models": list_of(_LISTED)})
    return {
        "/v1/models": _get("OpenAI and Anthropic: the models.", models),
        "/v1/models/{name}": _name_in_path(_get("OpenAI and Anthropic: a model.", _MODEL)),
        "/v1/messages/count_tokens": _post(
            "Anthropic: tokens of a prompt.", COUNT_TOKENS, object_of({"input_tokens": COUNT})
        ),
        "/api/show": _post("Ollama: what the model is.", SHOW, _SHOWN),
        "/api/tags": _get("Ollama: the models.", listed),
        "/api/ps": _get("Ollama: the models in memory.", listed),
        "/api/version": _get(
            "Ollama: the release whose API this is.", object_of({"version": TEXT})
        ),
        "/api/embed": _no_embeddings(),
        "/api/embeddings": _no_embeddings(),
        "/v1/embeddings": _no_embeddings(),
    }


def _about_the_daemon() -> Schema:
    status = {
        **{"model": TEXT, "started_s": COUNT},
        **dict.fromkeys(("apps", "running", "recent"), list_of(SOME_OBJECT)),
    }
    return {
        "/healthz": _get(
            "Whether the daemon answers.", object_of({"status": one_of("ok"), "model": TEXT})
        ),
        "/metrics": _get("Figures for Prometheus.", TEXT, "text/plain"),
        "/edgekv/status": _get(
            "What is going on: all of it at the socket, with a key that of its app.",
            object_of(status),
        ),
        "/openapi.json": _get("This document.", object_of({"openapi": TEXT, "paths": SOME_OBJECT})),
    }


def document() -> dict[str, Any]:
    """The whole of it."""
    paths = {**_generating(), **_about_models(), **_about_the_daemon()}
    for path, item in paths.items():
        operation = item.get("get") or item["post"]
        statuses = {*STATUS.values()}
        if "{name}" not in path:
            statuses.remove(STATUS["not_found"])
        if ("GET", path) in PUBLIC:
            statuses.remove(STATUS["unauthorized"])
            operation["security"] = []
        operation["responses"] |= _errors(path, statuses)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edgekv serve",
            "version": __version__,
            "description": "One model for every app of this machine. Fields that are not here are "
            "ignored, and null is as if a field were not there.",
        },
        "security": [{"bearer": []}, {"key": []}, {"socket": []}, {}],
        "paths": paths,
        "components": {"schemas": _ERRORS, "securitySchemes": _SECURITY_SCHEMES},
    }
