"""How models spell reasoning and calls of tools, as data; and which way is a model's own.

A model tells by its chat template, and by the tokens that it has. One whose template takes no
tools, or writes calls in a way that nobody here reads, gets a convention of plain JSON in its
system prompt.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from edgekv.chat.answer import AnswerParser, Thought, opened_thought
from edgekv.chat.channels import CONTROL, ChannelParser
from edgekv.chat.forced import CallForm, call_grammar
from edgekv.chat.lark import Lark
from edgekv.chat.span import Marks
from edgekv.chat.told import new_call_id
from edgekv.chat.values import Tool
from edgekv.tokenizer.grammar import Grammar

_PROMPT = """\
# Tools

You may call these tools. Each has a name, a description and a JSON schema of its parameters:
{tools}

To call a tool, answer with one line of JSON and nothing else:
{{"name": "<the tool's name>", "arguments": {{<its arguments, by the schema>}}}}
Several calls are several such lines. Their results come in the next message. If no tool is \
needed, answer in plain text."""

_THINK = ("<think>", "</think>")
_THOUGHTS: tuple[Thought, ...] = (
    _THINK,
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
# Which some templates write where nothing was thought, or where they leave out what was.
_EMPTY_THOUGHT = re.compile(
    "|".join(rf"{re.escape(opener)}\s*{re.escape(closer)}\s*" for opener, closer in _THOUGHTS)
)
# What small models write instead of their format; it counts where it calls a tool that there is.
_NEAR = (
    Marks(opener="```", closer="```", loose=True, inner=True),
    Marks(opener="{", loose=True, inner=True),
    Marks(opener="[{", loose=True, inner=True),
)
# Within calls.
_INNER = (
    *("[ARGS]", "[CALL_ID]", "<escape>", '<|"|>', "<parameter=", "</parameter>", "</function>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
_FUNCTION = Marks(opener="<function=", body="xml", loose=True, inner=True)
_FENCED = replace(_NEAR[0], opener="```json")
_ANALYSIS = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")
_NUM_THOUGHTS_MAX = 2  # before what is forced


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """How one model spells what is more than text in its answers.

    Attributes:
        name: For the user.
        needs: What of these its chat template must hold, all of each; the first format that
            fits is the model's.
        calls: What marks calls, its own ways first.
        form: How it writes calls that it must make.
        thoughts: What may enclose reasoning.
        channels: Instead of all these, an answer is messages in channels; see `channels`.
        leading: Reasoning that may stand before what is forced, where no prompt opens any.
        spelled: Control tokens that the parser must see in the text of answers.
    """

    name: str
    needs: tuple[str, ...] = ()
    calls: tuple[Marks, ...] = ()
    form: CallForm = field(default_factory=CallForm)
    thoughts: tuple[Thought, ...] = (_THINK,)
    channels: bool = False
    leading: Thought | None = None
    spelled: frozenset[str] = frozenset()

    def tools_prompt(self, tools: Sequence[Tool]) -> str:
        """For the system prompt of a model without a way of its own."""
        functions = (tool.to_function()["function"] for tool in tools)
        lines = (json.dumps(function, ensure_ascii=False) for function in functions)
        return _PROMPT.format(tools="\n".join(lines))

    def parser(
        self,
        *,
        tools: Sequence[Tool],
        opened: str = "",
        call_id: Callable[[], str] = new_call_id,
    ) -> AnswerParser:
        """Reads one answer; `opened` is what the prompt ended with."""
        parser = ChannelParser if self.channels else AnswerParser
        return parser(
            thoughts=self.thoughts, calls=self.calls, tools=tools, opened=opened, call_id=call_id
        )

    @cached_property
    def _control(self) -> tuple[str, ...]:
        return tuple(sorted(self.spelled))

    def call_grammar(
        self,
        tools: Sequence[Tool],
        *,
        name: str = "",
        parallel: bool = True,
        answer: Grammar | None = None,
    ) -> Grammar:
        """One call at least, of `name` if it is given; or an answer in JSON. See `forced`."""
        return call_grammar(
            self.form, tools, name=name, parallel=parallel, control=self._control, answer=answer
        )

    def constrained(self, grammar: Grammar, opened: str, *, calls: bool) -> Grammar:
        """The same for a whole answer, with the reasoning that may come before.

        Args:
            grammar: Of an answer's text; or, if it is one of `calls`, of `call_grammar`.
            opened: What the prompt ended with.
            calls: Which of the two.
        """
        grammar = replace(grammar, after=opened_thought(self.thoughts, opened))
        if self.leading is None:
            return grammar
        lark, (opener, closer) = Lark(self._control), self.leading
        answer = "" if calls else lark.text(self.form.answer)
        lark.rule("start", f"thought{{0,{_NUM_THOUGHTS_MAX}}}", answer, "@text")
        lark.rule("thought", lark.text(opener), lark.free("thought_text", closer, sorted(CONTROL)))
        return replace(grammar, lead=lark.source, control=self._control)


_FORMATS = (
    AnswerFormat(
        name="harmony",
        needs=("<|start|>assistant", "<|channel|>", "<|message|>"),
        form=CallForm(
            before="<|channel|>commentary to=functions.",
            body="named",
            arguments=" <|constrain|>json<|message|>",
            parallel=False,
            answer="<|channel|>final<|message|>",
        ),
        thoughts=(),
        channels=True,
        leading=_ANALYSIS,
    ),
    AnswerFormat(
        name="gemma4",
        needs=("<|tool_call>", "<tool_call|>"),
        calls=(Marks(opener="<|tool_call>", closer="<tool_call|>", body="braces"), *_NEAR),
        form=CallForm(before="<|tool_call>", after="<tool_call|>", between="", body="braces"),
    ),
    AnswerFormat(
        name="functiongemma",
        needs=("<start_function_call>",),
        calls=(
            Marks(opener="<start_function_call>", closer="<end_function_call>", body="braces"),
            *_NEAR,
        ),
        form=CallForm(
            before="<start_function_call>", after="<end_function_call>", between="", body="escaped"
        ),
    ),
    AnswerFormat(
        name="gemma",
        needs=("tools", "```tool_code"),
        calls=(
            Marks(opener="```tool_code", closer="```", body="python"),
            _FENCED,
            *_NEAR[1:],
        ),
        form=CallForm(before="```tool_code\n", after="\n```"),
    ),
    AnswerFormat(
        name="qwen3-coder",
        needs=("tools", "<function=", "<parameter="),
        calls=(
            Marks(opener="<tool_call>", closer="</tool_call>", body="xml"),
            replace(_FUNCTION, closer="</tool_call>"),
            *_NEAR,
        ),
        form=CallForm(before="<tool_call>\n", after="\n</tool_call>", body="xml"),
    ),
    AnswerFormat(
        name="glm",
        needs=("tools", "<tool_call>", "<arg_key>", "<arg_value>"),
        calls=(Marks(opener="<tool_call>", closer="</tool_call>", body="keyed"), *_NEAR),
        form=CallForm(before="<tool_call>", after="</tool_call>", between="", body="keyed"),
    ),
    AnswerFormat(
        name="olmo3",
        needs=("tools", "<function_calls>", "</function_calls>"),
        calls=(Marks(opener="<function_calls>", closer="</function_calls>", body="python"), *_NEAR),
        form=CallForm(first="<function_calls>\n", last="\n</function_calls>", body="python"),
    ),
    AnswerFormat(
        name="lfm2",
        needs=("tools", "List of tools: "),
        calls=(
            Marks(opener="<|tool_call_start|>", closer="<|tool_call_end|>", body="python"),
            *_NEAR,
        ),
        form=CallForm(
            first="<|tool_call_start|>[", between=", ", last="]<|tool_call_end|>", body="python"
        ),
    ),
    AnswerFormat(
        name="granite",
        needs=("tools", "<|tool_call|>", "<|start_of_role|>"),
        calls=(Marks(opener="<|tool_call|>"), *_NEAR),
        form=CallForm(first="<|tool_call|>[", between=", ", last="]"),
    ),
    AnswerFormat(
        name="mistral",
        needs=("tools", "[TOOL_CALLS]", "[ARGS]"),
        calls=(Marks(opener="[TOOL_CALLS]", body="named"), *_NEAR),
        form=CallForm(before="[TOOL_CALLS]", between="", body="named", arguments="[ARGS]"),
    ),
    AnswerFormat(
        name="mistral",
        needs=("tools", "[TOOL_CALLS]"),
        calls=(Marks(opener="[TOOL_CALLS]", body="named"), *_NEAR),
        form=CallForm(first="[TOOL_CALLS] [", between=", ", last="]"),
    ),
    AnswerFormat(
        name="phi4",
        needs=("tools", "<|tool_call|>"),
        calls=(Marks(opener="<|tool_call|>", closer="<|/tool_call|>"), *_NEAR),
        form=CallForm(first="<|tool_call|>[", between=", ", last="]<|/tool_call|>"),
    ),
    AnswerFormat(
        name="hermes",
        needs=("tools", "<tool_call>", '"arguments'),
        calls=(
            Marks(opener="<tool_call>", closer="</tool_call>"),
            Marks(opener="<tools>", closer="</tools>", loose=True),
            *_NEAR,
        ),
        form=CallForm(before="<tool_call>\n", after="\n</tool_call>"),
    ),
    AnswerFormat(
        name="llama3",
        needs=("tools", "<|start_header_id|>", '"parameters"'),
        calls=(Marks(opener="<|python_tag|>"), _FUNCTION, *_NEAR),
        form=CallForm(arguments="parameters", parallel=False),
    ),
)
_PLAIN = AnswerFormat(
    name="plain",
    calls=(Marks(opener="<tool_call>", closer="</tool_call>", loose=True), *_NEAR),
)


def can_think(template: str) -> bool:
    """Whether a model thinks before it speaks, or can."""
    is_named = any(opener in template for opener, _ in _THOUGHTS)
    return is_named or answer_format(template, ()).channels


def without_empty_thoughts(text: str) -> str:
    """A rendered conversation without the reasoning in which nothing was thought."""
    return _EMPTY_THOUGHT.sub("", text)


def answer_format(
    template: str, control: Collection[str], added: Collection[str] = ()
) -> AnswerFormat:
    """How a model spells its answers.

    Args:
        template: Its chat template's source; "" if it has none.
        control: Its control tokens.
        added: Other tokens that were added to its vocabulary.
    """
    fitting = (form for form in _FORMATS if all(text in template for text in form.needs))
    found = next(fitting, _PLAIN)
    thoughts = tuple(
        thought
        for thought in (() if found.channels else _THOUGHTS)
        # An answer that begins so can mean nothing else, whatever the template says.
        if thought == _THINK
        or any(mark in template or mark in control or mark in added for mark in thought)
    )
    marks = [mark for thought in thoughts for mark in thought]
    marks += [mark for call in found.calls for mark in (call.opener, call.closer)]
    marks += CONTROL if found.channels else _INNER
    spelled = {token for token in control if token and any(token in mark for mark in marks)}
    return replace(found, thoughts=thoughts, spelled=frozenset(spelled))
