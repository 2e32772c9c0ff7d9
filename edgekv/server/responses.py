"""OpenAI's Responses API (POST /v1/responses), without what a server would have to keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekv.chat.events import Finished
from edgekv.chat.values import Completion
from edgekv.config import SamplingParams
from edgekv.server.dialect import About, Asked, Dialect, Writer
from edgekv.server.fields import Fault, Fields, invalid
from edgekv.server.openai_errors import openai_error
from edgekv.server.responses_input import keeps_nothing, read_input
from edgekv.server.responses_stream import Maker, ResponsesWriter
from edgekv.server.responses_tools import Toolbox, json_text
from edgekv.server.spelling import NO_THINKING, sampling
from edgekv.tokenizer.grammar import Grammar

_MAX_TOKENS_MAX = 1 << 30
_TOP_LOGPROBS_MAX = 20


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What an answer's shape depends on.

    Attributes:
        toolbox: What the tools are called by the client.
        seals_reasoning: Whether `encrypted_content` was asked for.
        said_back: Fields of the request that its response repeats.
    """

    toolbox: Toolbox
    seals_reasoning: bool
    said_back: dict[str, Any]


class Responses(Dialect):
    """Stateless: the whole conversation comes with each request."""

    def parse(self, body: Fields) -> Asked:
        """Fields that change nothing here (store, truncation, user, ...) are not looked at."""
        for name in ("previous_response_id", "conversation", "prompt"):
            if body.has(name):
                raise keeps_nothing(name)
        if body.flag("background"):
            raise keeps_nothing("background")
        include = body.texts("include")
        toolbox = Toolbox(body.objects("tools"))
        text = body.mapping("text")
        form = text.mapping("format") if text else None
        completion = Completion(
            messages=read_input(body, toolbox),
            **toolbox.choice(body),
            parallel_tool_calls=body.flag("parallel_tool_calls", True),
            grammar=_grammar(form) if form else None,
            **_thinking(body),
            sampling=_sampling(body, include),
            session_key=body.text("prompt_cache_key", ""),
        )
        terms = Terms(
            toolbox=toolbox,
            seals_reasoning="reasoning.encrypted_content" in include,
            said_back=_said_back(body, form, toolbox, completion),
        )
        model, stream = body.text("model", ""), body.flag("stream")
        return Asked(completion=completion, model=model, stream=stream, terms=terms)

    def writer(self, asked: Asked, about: About) -> Writer:
        """Of one stream."""
        return ResponsesWriter(asked, about)

    def whole(self, asked: Asked, about: About, answers: Sequence[Finished]) -> dict[str, Any]:
        """A response object; there is one answer."""
        maker = Maker(asked, about)
        return maker.closed(answers[0], maker.items(answers[0]))

    def error(self, fault: Fault) -> dict[str, Any]:
        """In OpenAI's shape."""
        return openai_error(fault)


def _grammar(form: Fields) -> Grammar | None:
    kind = form.text("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(kind="json_object")
    if kind == "json_schema":
        return Grammar(kind="json_schema", text=json_text(form, "schema"))
    raise invalid(form.path("type"), "one of text, json_object, json_schema")


def _thinking(body: Fields) -> dict[str, Any]:
    reasoning = body.mapping("reasoning")
    if reasoning is None or not reasoning.has("effort"):
        return {}
    effort = reasoning.text("effort")
    return {"thinking": effort not in NO_THINKING, "effort": effort}


def _sampling(body: Fields, include: Sequence[str]) -> SamplingParams:
    top_logprobs = body.integer("top_logprobs", 0, _TOP_LOGPROBS_MAX) or 0
    are_asked = top_logprobs > 0 or "message.output_text.logprobs" in include
    return sampling(
        temperature=body.number("temperature", 0, 2),
        top_p=body.number("top_p", 0, 1),
        max_tokens=body.integer("max_output_tokens", 1, _MAX_TOKENS_MAX),
        logprobs=top_logprobs if are_asked else None,
    )


def _said_back(
    body: Fields, form: Fields | None, toolbox: Toolbox, completion: Completion
) -> dict[str, Any]:
    return {
        "parallel_tool_calls": completion.parallel_tool_calls,
        "tool_choice": toolbox.choice_said_back(completion),
        "temperature": body.number("temperature", 0, 2),
        "top_p": body.number("top_p", 0, 1),
        "max_output_tokens": completion.sampling.max_tokens,
        "top_logprobs": completion.sampling.logprobs or 0,
        "text": {"format": _format(form)},
        "metadata": _metadata(body),
    }


def _format(form: Fields | None) -> dict[str, Any]:
    """LangChain reads there whether the text is JSON."""
    kind = form.text("type", "text") if form else "text"
    if form is None or kind != "json_schema":
        return {"type": kind}
    return {"type": kind, "name": form.text("name", "answer"), "schema": form.raw("schema")}


def _metadata(body: Fields) -> dict[str, str]:
    metadata = body.raw("metadata")
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(it, str) for it in metadata.values()):
        raise invalid("metadata", "an object of strings")
    return metadata
