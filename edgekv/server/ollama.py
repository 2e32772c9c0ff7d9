"""Ollama's API: POST /api/chat and /api/generate, and what its clients ask about models.

Streams are JSON objects, one a line. Nothing else may stand in them: clients read every line.
"""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from edgekv.chat.events import (
    CallBegun,
    CallDelta,
    CallEnded,
    EndReason,
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
)
from edgekv.chat.values import ROLES, ChatMessage, Completion, Tool, ToolCall
from edgekv.config import SamplingParams
from edgekv.server.dialect import About, Asked, Dialect, Writer
from edgekv.server.fields import Fault, Fields, invalid
from edgekv.server.spelling import call_arguments, figures, json_schema, json_text, sampling
from edgekv.tokenizer.grammar import Grammar

# The release whose API this is; Codex wants 0.13.4 or later.
VERSION = "0.20.0"

_REASONS: dict[EndReason, str] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "stop",
    "cancelled": "length",  # more was to come
}
EFFORTS = ("low", "medium", "high", "max")
_NEVER = "9999-12-31T23:59:59Z"


class _Ollama(Dialect):
    """What both endpoints have in common; a part is a piece of the answer or all of it."""

    media_type = "application/x-ndjson"

    def writer(self, asked: Asked, about: About) -> Writer:
        """Of one stream."""
        return _LineWriter(self, asked, about)

    def whole(self, asked: Asked, about: About, answers: Sequence[Finished]) -> dict[str, Any]:
        """The answer that does not stream."""
        (finished,) = answers
        message = finished.message
        calls = [_call(call) for call in message.tool_calls if _is_whole(call)]
        more = {"thinking": message.reasoning, "tool_calls": calls}
        part = self.part(message.content, **{name: value for name, value in more.items() if value})
        logprobs = _logprobs(finished.logprobs)
        return {**_head(asked.model, about), **part, **logprobs, **_ending(finished)}

    def error(self, fault: Fault) -> dict[str, Any]:
        """Why there is no answer."""
        return {"error": fault.message}

    def loaded(self, body: Fields, about: About) -> dict[str, Any] | None:
        """The whole answer to who only wants the model loaded; None for who asks something.

        Clients do so by asking nothing. One line of it is also the stream.
        """
        if self.asks(body):
            return None
        ending = {"done": True, "done_reason": "load"}
        return {**_head(body.text("model"), about), **self.part(""), **ending}

    @abstractmethod
    def asks(self, body: Fields) -> bool:
        """Whether anything is asked."""

    @abstractmethod
    def part(self, text: str, **more: Any) -> dict[str, Any]:
        """A piece of the answer, or all of it; what else there is has Ollama's names."""


class OllamaChat(_Ollama):
    """POST /api/chat."""

    def parse(self, body: Fields) -> Asked:
        """What a request's body asks. Raises Fault."""
        tools = tuple(_tool(tool) for tool in body.objects("tools"))
        return _asked(body, messages=_conversation(body), tools=tools)

    def asks(self, body: Fields) -> bool:
        """Whether there are messages."""
        return bool(body.items("messages"))

    def part(self, text: str, **more: Any) -> dict[str, Any]:
        """A message."""
        return {"message": {"role": "assistant", "content": text, **more}}


class OllamaGenerate(_Ollama):
    """POST /api/generate. `template` and `context` are ignored: the model's own template holds."""

    def parse(self, body: Fields) -> Asked:
        """What a request's body asks. Raises Fault."""
        if not self.asks(body):
            raise invalid("prompt", "a text to answer")
        if body.text("suffix", ""):
            raise Fault("invalid", "suffix is not supported: no text is filled in", param="suffix")
        _refuse_images(body)
        prompt, system = body.text("prompt"), body.text("system", "")
        if body.flag("raw"):
            return _asked(body, prompt=prompt)
        opening = (ChatMessage(role="system", content=system),) if system else ()
        return _asked(body, messages=(*opening, ChatMessage(role="user", content=prompt)))

    def asks(self, body: Fields) -> bool:
        """Whether there is a prompt."""
        return bool(body.text("prompt", ""))

    def part(self, text: str, **more: Any) -> dict[str, Any]:
        """A response."""
        return {"response": text, **more}


class _LineWriter(Writer):
    """A line for each piece; a call is told as a whole."""

    def __init__(self, dialect: _Ollama, asked: Asked, about: About) -> None:
        self._dialect, self._asked, self._about = dialect, asked, about
        self._calling: dict[int, tuple[CallBegun, list[str]]] = {}  # by the call's index
        self._finished: Finished | None = None

    def begin(self) -> str:
        """A line without text."""
        return self.heartbeat()

    def event(self, event: Event, choice: int = 0) -> str:
        """What is said, thought or called."""
        assert choice == 0, "one answer a request"
        match event:
            case TextDelta(text=text) if text or event.logprobs:
                return self._line(self._dialect.part(text), **_logprobs(event.logprobs))
            case ReasoningDelta(text=text) if text:
                return self._line(self._dialect.part("", thinking=text))
            case CallBegun():
                self._calling[event.index] = (event, [])
            case CallDelta():
                self._calling[event.index][1].append(event.arguments)
            case CallEnded():
                begun, pieces = self._calling.pop(event.index)
                call = ToolCall(call_id=begun.call_id, name=begun.name, arguments="".join(pieces))
                return self._line(self._dialect.part("", tool_calls=[_call(call)]))
            case Finished():
                self._finished = event
        return ""

    def heartbeat(self) -> str:
        """A line without text; a client's reader wants all fields in each."""
        return self._line(self._dialect.part(""))

    def end(self) -> str:
        """The line that is `done`."""
        assert self._finished is not None, "ends after Finished"
        return self._line({**self._dialect.part(""), **_ending(self._finished)})

    def fail(self, fault: Fault) -> str:
        """The error's line, at which clients stop."""
        return json.dumps(self._dialect.error(fault)) + "\n"

    def _line(self, part: dict[str, Any], **fields: Any) -> str:
        # In ASCII: a client that reads lines splits at U+2028 too.
        return json.dumps({**_head(self._asked.model, self._about), **part, **fields}) + "\n"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What Ollama's clients want to know of the model that is served.

    Attributes:
        name: As clients call it.
        family: Of its architecture, as "qwen2".
        context_max: Tokens of prompt and answer together.
        num_parameters: Of all its weights.
        quantization: As "4-bit" or "bf16".
        size_bytes: Of its weights.
        digest: Tells it from others of the same name, hexadecimal.
        modified_s: When its files came; Unix time.
        can_think: Whether it can think first.
    """

    name: str
    family: str
    context_max: int
    num_parameters: int
    quantization: str
    size_bytes: int
    digest: str
    modified_s: int
    can_think: bool = False

    def details(self) -> dict[str, Any]:
        """As every answer about models has them."""
        return {
            "parent_model": "",
            "format": "safetensors",
            "family": self.family,
            "families": [self.family],
            "parameter_size": f"{self.num_parameters / 1e9:.1f}B",
            "quantization_level": self.quantization,
        }

    def entry(self) -> dict[str, Any]:
        """As lists of models have it."""
        named = {"name": self.name, "model": self.name}
        return {
            **named,
            "size": self.size_bytes,
            "digest": self.digest,
            "details": self.details(),
        }


def tags(models: Sequence[ModelCard]) -> dict[str, Any]:
    """GET /api/tags: the models that there are."""
    return {
        "models": [{**model.entry(), "modified_at": _time(model.modified_s)} for model in models]
    }


def ps(models: Sequence[ModelCard], expires_s: int | None = None) -> dict[str, Any]:
    """GET /api/ps: the models that are loaded, until `expires_s` if they rest until then."""
    expires = _NEVER if expires_s is None else _time(expires_s)
    return {
        "models": [
            {
                **model.entry(),
                "expires_at": expires,
                "size_vram": model.size_bytes,
                "context_length": model.context_max,
            }
            for model in models
        ]
    }


def version() -> dict[str, Any]:
    """GET /api/version."""
    return {"version": VERSION}


def show_name(body: Fields) -> str:
    """The model that POST /api/show asks about: `model`, or `name` as old clients say it."""
    return body.text("model", "") or body.text("name")


def show(model: ModelCard) -> dict[str, Any]:
    """POST /api/show: one model."""
    thinking = ["thinking"] if model.can_think else []
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": model.details(),
        "model_info": {
            "general.architecture": model.family,
            "general.parameter_count": model.num_parameters,
            f"{model.family}.context_length": model.context_max,
        },
        "capabilities": ["completion", "tools", *thinking],
        "modified_at": _time(model.modified_s),
    }


def no_embeddings() -> Fault:
    """What /api/embed and /api/embeddings answer."""
    return Fault("invalid", "edgekv computes no embeddings: it serves models that write text")


def _asked(body: Fields, **what: Any) -> Asked:
    completion = Completion(
        **what, grammar=_grammar(body), **_thinking(body), sampling=_sampling(body)
    )
    return Asked(completion=completion, model=body.text("model"), stream=body.flag("stream", True))


def _sampling(body: Fields) -> SamplingParams:
    options = body.mapping("options") or Fields({}, "options")
    top_k = options.integer("top_k", -(1 << 30), 1 << 30)
    max_tokens = options.integer("num_predict", -(1 << 30), 1 << 30)
    seed = options.integer("seed", -(1 << 63), (1 << 64) - 1)
    top_logprobs = body.integer("top_logprobs", 0, 20) or 0
    return sampling(
        temperature=options.number("temperature", 0, 100),
        top_k=None if top_k is None else max(top_k, 0),  # below 1 is all
        top_p=options.number("top_p", 0, 1),
        min_p=options.number("min_p", 0, 1),
        repetition_penalty=options.number("repeat_penalty", 0.01, 100),
        presence_penalty=options.number("presence_penalty", -2, 2),
        frequency_penalty=options.number("frequency_penalty", -2, 2),
        seed=seed if seed is not None and seed >= 0 else None,  # below 0 is any
        max_tokens=max_tokens if max_tokens is not None and max_tokens > 0 else None,  # no limit
        stop=options.texts("stop"),
        logprobs=top_logprobs if body.flag("logprobs") else None,
    )


def _grammar(body: Fields) -> Grammar | None:
    value = body.raw("format")
    if value is None or value == "":
        return None
    if value == "json":
        return Grammar(kind="json_object")
    if not isinstance(value, dict):
        raise invalid("format", '"json" or a JSON schema')
    return json_schema(body, "format")


def _thinking(body: Fields) -> dict[str, Any]:
    """Ollama's efforts are all thinking."""
    value = body.raw("think")
    if value is None or isinstance(value, bool):
        return {"thinking": value}
    if value not in EFFORTS:
        raise invalid("think", f"true, false or one of {', '.join(EFFORTS)}")
    return {"thinking": True, "effort": value}


def _refuse_images(fields: Fields) -> None:
    if fields.items("images"):
        path = fields.path("images")
        raise Fault("invalid", f"{path}: edgekv takes text, no images", param=path)


def _tool(fields: Fields) -> Tool:
    function = fields.mapping("function")
    if function is None:
        raise invalid(fields.path("function"), "an object with the function's name")
    tool = Tool(name=function.text("name"), description=function.text("description", ""))
    if function.mapping("parameters") is None:
        return tool
    schema = json_text(function.raw("parameters"), function.path("parameters"))
    return Tool(name=tool.name, description=tool.description, parameters=schema)


def _conversation(body: Fields) -> tuple[ChatMessage, ...]:
    messages = body.objects("messages")
    if not messages:
        raise invalid("messages", "a list of at least one message")
    conversation = _Conversation()
    return tuple(conversation.read(message) for message in messages)


class _Conversation:
    """Messages as they are read. Calls get ids by their place, for Ollama's clients keep none.

    A result is that of the first call without one that has its name, or else of the first.
    """

    def __init__(self) -> None:
        self._waiting: list[ToolCall] = []
        self._num_calls = 0

    def read(self, message: Fields) -> ChatMessage:
        """One message. Raises Fault."""
        _refuse_images(message)
        role, content = message.text("role"), message.text("content", "")
        if role == "tool":
            names = message.text("tool_name", ""), message.text("name", "")
            return self._result(content, names[0] or names[1])
        if role not in ROLES:
            raise invalid(message.path("role"), f"one of {', '.join(ROLES)}")
        calls = tuple(self._call(call) for call in message.objects("tool_calls"))
        thinking = message.text("thinking", "")
        return ChatMessage(role=role, content=content, reasoning=thinking, tool_calls=calls)

    def _call(self, fields: Fields) -> ToolCall:
        function = fields.mapping("function")
        if function is None:
            raise invalid(fields.path("function"), "an object with the function's name")
        function.mapping("arguments")
        arguments = json_text(function.raw("arguments") or {}, function.path("arguments"))
        call_id = f"call_{self._num_calls}"
        self._num_calls += 1
        call = ToolCall(call_id=call_id, name=function.text("name"), arguments=arguments)
        self._waiting.append(call)
        return call

    def _result(self, content: str, name: str) -> ChatMessage:
        named = [call for call in self._waiting if call.name == name] or self._waiting
        if not named:
            return ChatMessage(role="tool", content=content, name=name)
        call = named[0]
        self._waiting.remove(call)
        return ChatMessage(role="tool", content=content, call_id=call.call_id, name=call.name)


def _is_whole(call: ToolCall) -> bool:
    return call_arguments(call.arguments) is not None


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call_arguments(call.arguments) or {}}
    return {"id": call.call_id, "function": function}


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    if not tokens:
        return {}
    return {
        "logprobs": [
            {**_logprob(token), "top_logprobs": [_logprob(likely) for likely in token.top]}
            for token in tokens
        ]
    }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.token_bytes)}


def _head(model: str, about: About) -> dict[str, Any]:
    return {"model": model, "created_at": _time(about.created_s), "done": False}


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _ending(finished: Finished) -> dict[str, Any]:
    """Durations are in nanoseconds; that of the prompt is without its queueing."""
    stats, usage = finished.stats, finished.usage
    per_s, num_gaps = stats.decode_tokens_per_s, max(stats.num_output_tokens - 1, 0)
    decode_ns = round(num_gaps / per_s * 1e9) if per_s else 0
    queue_ns, prefill_ns = round(stats.queue_ms * 1e6), round(stats.prefill_ms * 1e6)
    return {
        "done": True,
        "done_reason": _REASONS[finished.reason],
        "total_duration": queue_ns + prefill_ns + decode_ns,
        "load_duration": 0,
        "prompt_eval_count": usage.num_prompt,
        "prompt_eval_duration": prefill_ns,
        "eval_count": usage.num_output,
        "eval_duration": decode_ns,
        "edgekv": figures(stats),
    }
