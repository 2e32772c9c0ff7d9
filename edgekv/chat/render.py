"""Renders a conversation by the model's chat template, whatever the template refuses.

What a template takes is found out by trying, once for each template: small conversations, in which
every text is a word that stands nowhere else, are rendered; a template takes what it neither
refuses nor loses nor moves to another place. It is asked one question after another, and for each
the first way of writing that it takes is the way from then on (`Traits`). That depends on nothing
but the template, so that no turn of a conversation is rendered in another way than those before.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, count, product
from typing import Any

from edgekv.chat.template_messages import Traits, conversation_messages
from edgekv.chat.values import ChatMessage, Role, Tool, ToolCall
from edgekv.errors import ChatTemplateError
from edgekv.tokenizer import ChatTemplate, RenderedChat, Tokenizer


def render(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] = (),
    *,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    effort: str = "",
    tools_prompt: str = "",
) -> RenderedChat:
    """The conversation as the model reads it.

    Args:
        tokenizer: The model's.
        messages: In any order of roles.
        tools: That the model may call.
        add_generation_prompt: Whether to open the assistant's turn.
        thinking: Whether a model that can think first does; None leaves it to its template.
        effort: How much it does, in a word that its template takes: see `effort_of`.
        tools_prompt: What the model is told of tools if there are any and its template does not
            write them (`takes_tools`): the end of the first system message.

    Raises:
        ChatTemplateError: The template is malformed, or refuses even user and assistant in turn.
        RequestError: A text holds a lone surrogate.
    """
    traits = traits_of(tokenizer.chat_template)
    if tools and not traits.tools:
        messages, tools = _with_prompt(messages, tools_prompt), ()
    functions = [tool.to_function() for tool in tools] or None
    switches = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    variables = switches | ({_EFFORT: effort} if effort else {})

    def rendered(traits: Traits) -> RenderedChat:
        return tokenizer.render_chat(
            conversation_messages(messages, traits),
            tools=functions,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    try:
        return rendered(traits)
    except ChatTemplateError as error:
        # Roles in an order that nobody foresaw.
        try:
            return rendered(traits.plainest())
        except ChatTemplateError:
            raise error from None


def effort_of(tokenizer: Tokenizer, effort: str) -> str:
    """The word for an effort that the model's template takes; "" if it takes none."""
    template = tokenizer.chat_template
    if template is None or _EFFORT not in template.source or effort not in _EFFORTS:
        return ""
    word = effort if _names(template, effort) else _EFFORTS[effort]
    return word if _knows_effort(template, word) else ""


@lru_cache(maxsize=64)
def _knows_effort(template: ChatTemplate, word: str) -> bool:
    """Whether a template does not refuse this word."""
    try:
        template.render([{"role": "user", "content": "Hi"}], variables={_EFFORT: word})
    except ChatTemplateError:
        return False
    return True


def takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the model's template tells it which tools there are."""
    return traits_of(tokenizer.chat_template).tools


def _with_prompt(messages: Sequence[ChatMessage], prompt: str) -> Sequence[ChatMessage]:
    if not prompt:
        return messages
    if messages and messages[0].role in ("system", "developer"):
        content = "\n\n".join(filter(None, (messages[0].content, prompt)))
        return [replace(messages[0], content=content), *messages[1:]]
    return [ChatMessage(role="system", content=prompt), *messages]


# --- what a template takes ---


@dataclass(frozen=True, kw_only=True)
class _Question:
    """Ways of writing, the best first, and conversations which the template must take so."""

    ways: Sequence[Mapping[str, Any]]
    samples: Sequence[str]  # see `_sample`


_THOUGHTS = ("reasoning_content", "thinking", "reasoning", "blocks")
_QUESTIONS = (
    _Question(ways=({"alternates": False}, {"alternates": True}), samples=("uuaau", "au")),
    _Question(ways=({"developer": True}, {"developer": False}), samples=("duadu",)),
    _Question(
        ways=[{"system": where} for where in ("anywhere", "first", "none")],
        samples=("suau", "ssu", "suasu"),
    ),
    _Question(ways=({"tools": True}, {"tools": False}), samples=("u", "suau")),
    _Question(
        ways=[
            {"calls": calls, "silent": silent, "short_ids": short_ids}
            for calls, silent, short_ids in product(("object", "text"), ("", None), (False, True))
        ]
        + [{"calls": "plain"}],
        samples=("uct", "uctau"),
    ),
    _Question(ways=({"any_arguments": True}, {"any_arguments": False}), samples=("uxtau",)),
    _Question(
        ways=[{"several": how} for how in ("together", "apart", "plain")],
        samples=("u2tt", "u2ttau"),
    ),
    _Question(
        ways=[{"beside": how} for how in ("beside", "before", "plain")],
        samples=("ubt", "ubtau"),
    ),
    _Question(
        ways=[{"thoughts": key} for key in (*_THOUGHTS, _THOUGHTS[0])],  # where none comes out
        samples=("urt",),
    ),
)
_EFFORT = "reasoning_effort"
# The words that all templates know which write what they are given, and what is nearest to others.
_EFFORTS = {
    **{word: word for word in ("low", "medium", "high")},
    **{"none": "low", "minimal": "low", "xhigh": "high", "max": "high"},
}
_WORD = re.compile(r"mark\d\dend")
_KEY = "mark99end"  # of arguments
_BLOCK = re.compile(r"""["']thinking["']: """)
_TOOL = Tool(
    name="mark90end",
    description="mark91end",
    parameters='{"type":"object","properties":{"mark92end":{"type":"string"}}}',
)


@lru_cache(maxsize=16)
def traits_of(template: ChatTemplate | None) -> Traits:
    """What a template takes; None is the plain form of a model that has none."""
    if template is None:
        return Traits(developer=False, tools=False, calls="plain")
    traits = Traits(tools=False)
    if not _takes(template, traits, "u"):
        traits = replace(traits, blocks=True)
        if not _takes(template, traits, "u"):
            return replace(traits, blocks=False).plainest()
    for question in _QUESTIONS:
        ways = [replace(traits, **way) for way in question.ways]
        traits = next(
            (way for way in ways if all(_takes(template, way, s) for s in question.samples)),
            ways[-1],
        )
    # It may write any role, but if it does not know this one, nor does the model.
    traits = replace(traits, developer=traits.developer and _names(template, "developer"))
    more = replace(
        traits,
        results=traits.calls == "plain" and traits.tools,  # else the model knows no results
        responses=traits.calls != "plain" and _names(template, "tool_responses"),
    )
    return more if all(_takes(template, more, s) for s in ("uct", "uctau", "u2ttau")) else traits


def _names(template: ChatTemplate, word: str) -> bool:
    """Whether a template knows this word."""
    return re.search(rf"""["']{re.escape(word)}["']""", template.source) is not None


def _takes(template: ChatTemplate, traits: Traits, sample: str) -> bool:
    """Whether all words of a sample come out, in the order of its messages."""
    messages = _sample(sample)
    written = conversation_messages(messages, traits)
    if any(not m["content"] and "tool_calls" not in m for m in written):
        return False  # an empty turn was put in, perhaps between a result and the answer to it
    tools = [_TOOL.to_function()] if traits.tools else None
    try:
        text = template.render(written, tools=tools)
    except ChatTemplateError:
        return False
    if f"'{_KEY}':" in text:  # a mapping as Python prints it, which is no JSON
        return False
    if traits.thoughts == "blocks" and _BLOCK.search(text):  # a block as it was given
        return False
    words = [_WORD.findall(repr(message)) for message in messages]
    tool_words = _WORD.findall(repr(_TOOL)) if traits.tools else []
    if not all(word in text for word in chain(tool_words, *words)):
        return False
    places = [find(map(text.find, said)) for said in words for find in (min, max)]
    return places == sorted(places)


def _sample(letters: str) -> list[ChatMessage]:
    """A conversation, a letter a message.

    system, user, assistant, developer; t: a tool's result; what the assistant calls: a call, two
    calls, both a text and a call, x: a call whose arguments are no JSON object, r: one with the
    reasoning before it.
    """
    numbers = count()
    roles: dict[str, Role] = {
        "s": "system", "u": "user", "a": "assistant", "d": "developer", "t": "tool",
    }  # fmt: skip
    ids: list[str] = []

    def word() -> str:
        return f"mark{next(numbers):02}end"

    def call(*, is_object: bool = True) -> ToolCall:
        ids.append(f"call_{len(ids)}")
        arguments = f'{{"{_KEY}": "{word()}"}}' if is_object else word()
        return ToolCall(call_id=ids[-1], name=word(), arguments=arguments)

    def message(letter: str) -> ChatMessage:
        if letter in roles:
            call_id = ids.pop(0) if letter == "t" else ""
            return ChatMessage(role=roles[letter], content=word(), call_id=call_id)
        calls = [call(is_object=letter != "x") for _ in range(2 if letter == "2" else 1)]
        content, thought = (word() if letter == kind else "" for kind in "br")
        return ChatMessage(
            role="assistant", content=content, reasoning=thought, tool_calls=tuple(calls)
        )

    return [message(letter) for letter in letters]
