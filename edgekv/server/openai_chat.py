"""OpenAI's chat completions: JSON to what is asked, events to JSON and SSE.

What they offer and edgekv has not is refused where it would change the answer (images, audio, more
than one prompt, `logit_bias`) and ignored where it would not (`user`, `store`, `metadata`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekv.chat.events import (
    CallBegun,
    CallDelta,
    EndReason,
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    Usage,
)
from edgekv.chat.values import ROLES, ChatMessage, Completion, Tool, ToolCall, ToolChoice
from edgekv.config import SamplingParams
from edgekv.server.dialect import NUM_ANSWERS_MAX, About, Asked, Dialect, Writer, sse
from edgekv.server.fields import Fault, Fields, invalid
from edgekv.server.openai_errors import openai_error
from edgekv.server.spelling import NO_THINKING, figures, json_schema, json_text, sampling
from edgekv.tokenizer.grammar import Grammar

STOPS_MAX = 16
TOKENS_MAX = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the answer depends on beside the events."""

    include_usage: bool = False
    num_top: int | None = None  # alternatives beside each token


def sampling_of(body: Fields, *, max_tokens: int | None, num_top: int | None) -> SamplingParams:
    """How tokens are chosen."""
    stop = body.texts("stop")
    if len(stop) > STOPS_MAX or not all(stop):
        raise invalid("stop", f"at most {STOPS_MAX} strings that are not empty")
    if body.raw("logit_bias") not in (None, {}):
        raise invalid("logit_bias", "an empty object, for edgekv moves no single token's logit")
    seed = body.integer("seed", -(1 << 63), (1 << 64) - 1)
    return sampling(
        temperature=body.number("temperature", 0, 100),
        top_p=body.number("top_p", 0, 1),
        top_k=body.integer("top_k", 0, 1 << 30),
        min_p=body.number("min_p", 0, 1),
        repetition_penalty=body.number("repetition_penalty", 0.01, 100),
        presence_penalty=body.number("presence_penalty", -2, 2),
        frequency_penalty=body.number("frequency_penalty", -2, 2),
        seed=None if seed is None else seed % (1 << 64),
        max_tokens=max_tokens,
        stop=stop,
        logprobs=num_top,
    )


def max_tokens_of(body: Fields) -> int | None:
    """How long the answer may be, by any of the names that this has had."""
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    said = [body.integer(name, 1, TOKENS_MAX) for name in names]
    return next(filter(None, said), None)


class ChatCompletions(Dialect):
    """POST /v1/chat/completions."""

    def parse(self, body: Fields) -> Asked:
        """What a request's body asks. Raises Fault."""
        messages = tuple(_message(item) for item in body.objects("messages"))
        if not messages:
            raise invalid("messages", "a list of at least one message")
        choice, name = _tool_choice(body)
        top = body.integer("top_logprobs", 0, 20) or 0
        num_top = top if body.flag("logprobs") else None
        effort = body.text("reasoning_effort", "")
        template = body.mapping("chat_template_kwargs")
        if template is not None:
            effort = template.text("reasoning_effort", effort)
        thinking = effort not in NO_THINKING if effort else None
        if template is not None and template.has("enable_thinking"):
            thinking = template.flag("enable_thinking")
        return Asked(
            completion=Completion(
                messages=messages,
                tools=tuple(_tool(item) for item in body.objects("tools")),
                tool_choice=choice,
                tool_name=name,
                parallel_tool_calls=body.flag("parallel_tool_calls", True),
                grammar=_response_format(body),
                thinking=thinking,
                effort=effort,
                sampling=sampling_of(body, max_tokens=max_tokens_of(body), num_top=num_top),
            ),
            model=body.text("model", ""),
            stream=body.flag("stream"),
            num_answers=body.integer("n", 1, NUM_ANSWERS_MAX) or 1,
            terms=Terms(include_usage=includes_usage(body), num_top=num_top),
        )

    def writer(self, asked: Asked, about: About) -> Writer:
        """Of one stream."""
        return ChatWriter(asked, about)

    def whole(self, asked: Asked, about: About, answers: Sequence[Finished]) -> dict[str, Any]:
        """The answer that does not stream."""
        choices = [
            {
                "index": index,
                "message": _answer(answer.message),
                "logprobs": _logprobs(answer.logprobs, asked),
                "finish_reason": end_reason(answer.reason),
            }
            for index, answer in enumerate(answers)
        ]
        return {
            **head(asked, about, "chat.completion"),
            "choices": choices,
            "usage": usage_of([answer.usage for answer in answers]),
            "edgekv": figures(answers[0].stats),
        }

    def error(self, fault: Fault) -> dict[str, Any]:
        """Why there is none."""
        return openai_error(fault)


# --- streams ---


class ChatWriter(Writer):
    """Chunks; the last ones say why each answer ended, and then what was used."""

    kind = "chat.completion.chunk"

    def __init__(self, asked: Asked, about: About) -> None:
        self._asked = asked
        self._head = head(asked, about, self.kind)
        self._usages: list[Usage] = []
        self._stats: dict[str, Any] = {}

    def begin(self) -> str:
        """The opening."""
        delta = {"role": "assistant", "content": ""}
        return "".join(self._chunk(i, delta) for i in range(self._asked.num_answers))

    def event(self, event: Event, choice: int = 0) -> str:
        """What happened, of one answer."""
        match event:
            case TextDelta(text=text, logprobs=logprobs):
                shown = _logprobs(logprobs, self._asked)
                return self._chunk(choice, {"content": text}, logprobs=shown)
            case ReasoningDelta(text=text):
                return self._chunk(choice, {"reasoning_content": text})
            case CallBegun(index=index, call_id=call_id, name=name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                return self._chunk(choice, {"tool_calls": [call]})
            case CallDelta(index=index, arguments=arguments):
                call = {"index": index, "function": {"arguments": arguments}}
                return self._chunk(choice, {"tool_calls": [call]})
            case Finished():
                self._usages.append(event.usage)
                self._stats = self._stats or figures(event.stats)
                return self._chunk(choice, {}, reason=end_reason(event.reason))
        return ""

    def heartbeat(self) -> str:
        """What shows that the request lives."""
        return self._chunk(0, {})

    def end(self) -> str:
        """The last."""
        last: dict[str, Any] = {"choices": [], "edgekv": self._stats}
        if self._asked.terms.include_usage:
            last["usage"] = usage_of(self._usages)
        shown = self._asked.terms.include_usage
        return (sse(compact(self._head | last)) if shown else "") + sse("[DONE]")

    def fail(self, fault: Fault) -> str:
        """The last, where something went wrong."""
        return sse(compact(openai_error(fault))) + sse("[DONE]")

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> str:
        shown: dict[str, Any] = {"index": choice, "delta": delta, "finish_reason": reason}
        if logprobs is not None:
            shown["logprobs"] = logprobs
        more: dict[str, Any] = {"usage": None} if self._asked.terms.include_usage else {}
        if reason is not None and not self._asked.terms.include_usage:
            more["edgekv"] = self._stats
        return sse(compact({**self._head, "choices": [shown], **more}))


# --- requests ---


def includes_usage(body: Fields) -> bool:
    """Whether a stream ends with what was used."""
    options = body.mapping("stream_options")
    return options is not None and options.flag("include_usage")


def _message(item: Fields) -> ChatMessage:
    role = item.text("role")
    if role == "function":  # as tools were called once
        role = "tool"
    if role not in ROLES:
        raise invalid(item.path("role"), " or ".join(ROLES))
    reasoning = item.raw("reasoning_content") or item.raw("reasoning") or ""
    name = item.text("name", "")
    return ChatMessage(
        role=role,
        content=content_text(item, "content"),
        reasoning=reasoning if isinstance(reasoning, str) and role == "assistant" else "",
        tool_calls=tuple(_call(call) for call in item.objects("tool_calls")),
        call_id=item.text("tool_call_id", ""),
        name=name if role == "tool" else "",
    )


def content_text(item: Fields, name: str) -> str:
    """The text of a content: a string, or a list of parts, of which there is no other kind."""
    value = item.raw(name)
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise invalid(item.path(name), "a string or a list of parts")
    texts = []
    for part in item.objects(name):
        kind = part.text("type", "text")
        if kind not in ("text", "refusal"):
            where = part.path("type")
            raise Fault("invalid", f"{where}: {kind} is not supported, only text", param=where)
        texts.append(part.text(kind, ""))
    return "".join(texts)


def _call(item: Fields) -> ToolCall:
    kind = item.text("type", "function")
    function = item.mapping(kind) if kind in ("function", "custom") else None
    if function is None:
        raise invalid(item.path("type"), "function")
    arguments = function.raw("arguments" if kind == "function" else "input")
    if not isinstance(arguments, str):  # some clients send the object itself
        arguments = json.dumps(arguments if arguments is not None else {})
    return ToolCall(call_id=item.text("id", ""), name=function.text("name"), arguments=arguments)


def _tool(item: Fields) -> Tool:
    kind = item.text("type", "function")
    function = item.mapping("function") if kind == "function" else None
    if function is None:
        raise Fault("invalid", f"{item.path('type')}: {kind} is not supported, only function")
    parameters = function.raw("parameters")
    if parameters is None:
        return Tool(name=function.text("name"), description=function.text("description", ""))
    if not isinstance(parameters, dict):
        raise invalid(function.path("parameters"), "a JSON schema")
    return Tool(
        name=function.text("name"),
        description=function.text("description", ""),
        parameters=json_text(parameters, function.path("parameters")),
    )


def _tool_choice(body: Fields) -> tuple[ToolChoice, str]:
    value = body.raw("tool_choice")
    if value is None:
        return "auto", ""
    match value:
        case "required" if not body.items("tools"):
            raise invalid("tool_choice", "auto or none where no tool is offered")
        case "auto" | "none" | "required":
            return value, ""
        case {"type": "function", "function": {"name": str(name)}}:
            names = [
                f.text("name", "") for t in body.objects("tools") if (f := t.mapping("function"))
            ]
            if name not in names:
                message = f"tool_choice names {name!r}, which is no tool here"
                raise Fault("invalid", message, param="tool_choice")
            return "required", name
    raise invalid("tool_choice", "auto, none, required, or a function by name")


def _response_format(body: Fields) -> Grammar | None:
    wanted = body.mapping("response_format")
    if wanted is None:
        return None
    match wanted.text("type"):
        case "text":
            return None
        case "json_object":
            return Grammar(kind="json_object")
        case "json_schema":
            named = wanted.mapping("json_schema")
            return json_schema(named or Fields({}, "response_format.json_schema"), "schema")
    raise invalid("response_format.type", "text, json_object or json_schema")


# --- answers ---


def head(asked: Asked, about: About, kind: str) -> dict[str, Any]:
    """What every object of an answer begins with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {
        "id": f"{prefix}-{about.request_id}",
        "object": kind,
        "created": about.created_s,
        "model": asked.model,
    }


def _answer(message: ChatMessage) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning:
        shown["reasoning_content"] = message.reasoning
    if message.tool_calls:
        shown["content"] = message.content or None
        shown["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return shown


def end_reason(reason: EndReason) -> str:
    """Why an answer ended, in the API's words."""
    return "stop" if reason == "cancelled" else reason


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """Of all answers together; they have one prompt."""
    num_prompt = max((usage.num_prompt for usage in usages), default=0)
    num_output = sum(usage.num_output for usage in usages)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {
            "cached_tokens": max((usage.num_cached for usage in usages), default=0)
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(usage.num_reasoning for usage in usages)
        },
    }


def _logprobs(rows: Sequence[TokenLogprob], asked: Asked) -> dict[str, Any] | None:
    if asked.terms.num_top is None:
        return None
    content = [{**_row(row), "top_logprobs": [_row(top) for top in row.top]} for row in rows]
    return {"content": content}


def _row(row: TokenLogprob) -> dict[str, Any]:
    return {"token": row.token, "logprob": row.logprob, "bytes": list(row.token_bytes)}


def compact(value: object) -> str:
    """JSON without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
