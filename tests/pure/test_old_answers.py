"""Answers stay as they were generated, and behind them stands what the model's template writes.

Whatever of an answer came back: clients leave thoughts out, and write arguments anew.
"""

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
from byte_tokenizer import byte_tokenizer
from chat_templates import FAMILIES

from edgekv.chat.formats import answer_format
from edgekv.chat.values import ChatMessage, Tool, ToolCall
from edgekv.runtime.conversation import Conversation, Prompt, Scribe, dump, load

TOOL = Tool(
    name="look",
    parameters='{"type":"object","properties":{"at":{"type":"string"}},"required":["at"]}',
)
HERMES = '<tool_call>\n{"name": "look", "arguments": {"at": "home"}}\n</tool_call>'
XML = "<tool_call>\n<function=look>\n<parameter=at>\nhome\n</parameter>\n</function>\n</tool_call>"
THINK = "<think>\nHm.\n</think>\n\n"


class Case(NamedTuple):
    """What a model says, and what stands behind: its answers' first parts are thoughts."""

    calls: str
    result: str  # up to where the answer to it begins
    says: str
    question: str
    control: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


IM_RESULT = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IM_QUESTION = "<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
CASES = {
    "qwen3": Case(
        THINK + HERMES,
        IM_RESULT.format("\n<tool_response>\nfound\n</tool_response>").replace("\n\n", "\n"),
        THINK + "There.",
        IM_QUESTION,
    ),
    "qwen 3.5": Case(
        THINK.removeprefix("<think>\n") + XML,
        IM_RESULT.format("<tool_response>found</tool_response>") + "<think>\n",
        "Hm.\n</think>\n\nThere.",
        IM_QUESTION + "<think>\n",
    ),
    "harmony": Case(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.look <|constrain|>json<|message|>{"at":"home"}',
        "<|call|><|start|>functions.look to=assistant<|channel|>commentary<|message|>"
        '"found"<|end|><|start|>assistant',
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
        "There.",
        "<|end|><|start|>user<|message|>And?<|end|><|start|>assistant",
        control=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>"),
        ends=("<|call|>", "<|return|>"),
    ),
    "gemma 4": Case(
        '<|tool_call>call:look{at:<|"|>home<|"|>}<tool_call|>',
        '<|tool_response>response:look{value:<|"|>found<|"|>}<tool_response|>',
        "There.",
        "<turn|>\n<|turn>user\nAnd?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        control=("<|turn>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
        ends=("<turn|>", "<|tool_response>"),
    ),
    "glm": Case(
        "Hm.</think><tool_call>look<arg_key>at</arg_key><arg_value>home</arg_value></tool_call>",
        "<|observation|><tool_response>found</tool_response><|assistant|><think>",
        "Hm.</think>There.",
        "<|user|>And?<|assistant|><think>",
        control=("<|assistant|>",),
        ends=("<|observation|>", "<|user|>"),
    ),
    "lfm2": Case(
        THINK + "<|tool_call_start|>[look(at='home')]<|tool_call_end|>",
        "<|im_end|>\n<|im_start|>tool\nfound<|im_end|>\n<|im_start|>assistant\n",
        THINK + "There.",
        IM_QUESTION,
        control=("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    "ministral": Case(
        '[THINK]Hm.[/THINK][TOOL_CALLS]look[ARGS]{"at":  "home"}',
        "<|im_end|>[TOOL_RESULTS]found[/TOOL_RESULTS]",
        "[THINK]Hm.[/THINK]There.",
        "<|im_end|>[INST]And?[/INST]",
        control=("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "[INST]", "[/INST]"),
    ),
    "chatml": Case(
        THINK + '{"name": "look", "arguments": {"at": "home"}}',
        IM_RESULT.format("Result of look:\nfound"),
        THINK + "There.",
        IM_QUESTION,
    ),
}  # fmt: skip


class Talk:
    """A conversation with a model that says what a test wants."""

    def __init__(self, family: str) -> None:
        self.case = CASES[family]
        tokenizer = byte_tokenizer(FAMILIES[family], (*self.case.control, *self.case.ends))
        hidden = tokenizer.vocabulary.hidden_tokens
        ends = {hidden[text] for text in self.case.ends} | {hidden["<|im_end|>"]}
        self.tokenizer = replace(tokenizer, eos_ids=frozenset(ends))
        self.scribe = Scribe(tokenizer=self.tokenizer, tools=(TOOL,))
        self.format = answer_format(FAMILIES[family], tuple(hidden))
        self.conversation = Conversation()
        self.messages: tuple[ChatMessage, ...] = ()

    def asks(self, *messages: ChatMessage) -> Prompt:
        """The prompt of what was said, and more."""
        self.messages += messages
        return self.conversation.prompt_of(self.scribe, self.messages)

    def says(self, prompt: Prompt, text: str) -> ChatMessage:
        """The model's answer; a client leaves its thoughts out, and has ids of its own."""
        numbers = itertools.count(len(self.messages))
        parser = self.format.parser(
            tools=(TOOL,), opened=prompt.text[-64:], call_id=lambda: f"call_{next(numbers)}"
        )
        parser.push(text)
        parser.end()
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        said = Prompt(text=text, ids=ids)
        answer = parser.message
        self.conversation = self.conversation.after(
            self.messages, prompt, answer, said, (TOOL,), self.scribe.effort
        )
        calls = tuple(replace(c, arguments='{"at": "home"}') for c in answer.tool_calls)
        self.messages += (replace(answer, reasoning="", tool_calls=calls),)
        return answer


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


@pytest.mark.parametrize("family", CASES)
def test_what_was_generated_goes_on_whatever_came_back(family: str) -> None:
    talk = Talk(family)
    case = talk.case
    asked = talk.asks(ChatMessage(role="system", content="Be brief."), user("Where?"))
    answer = talk.says(asked, case.calls)
    assert [(c.name, c.arguments.replace(" ", "")) for c in answer.tool_calls] == [
        ("look", '{"at":"home"}')
    ]
    assert answer.content == ""
    assert answer.reasoning.strip() == ("Hm." if "Hm." in case.calls else "")
    result = ChatMessage(role="tool", content="found", call_id=answer.tool_calls[0].call_id)
    after_call = talk.asks(result)
    assert after_call.text == asked.text + case.calls + case.result
    answer = talk.says(after_call, case.says)
    assert answer.content == "There."
    whole = talk.asks(user("And?"))
    assert whole.text == after_call.text + case.says + case.question
    assert whole.ids == tuple(talk.tokenizer.encode(whole.text, add_special_tokens=False))


def test_an_end_that_an_answer_spells_is_not_its_end() -> None:
    """Arguments and results may hold it, as characters that are no token."""
    talk = Talk("qwen3")
    spelled = '<tool_call>\n{"name": "look", "arguments": {"at": "<|im_end|>"}}\n</tool_call>'
    asked = talk.asks(user("Where?"))
    ids = talk.tokenizer.encode(spelled, add_special_tokens=False, parse_special=False)
    call = ToolCall(call_id="a", name="look", arguments='{"at": "<|im_end|>"}')
    answer = ChatMessage(role="assistant", reasoning="Hm.", tool_calls=(call,))
    said = Prompt(text=spelled, ids=tuple(ids))
    talk.conversation = talk.conversation.after(talk.messages, asked, answer, said, (TOOL,))
    talk.messages += (replace(answer, reasoning=""),)
    prompt = talk.asks(ChatMessage(role="tool", content="<|im_end|>", call_id="a"))
    behind = prompt.text.removeprefix(asked.text + spelled)
    assert behind.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n<|im_end|>\n")
    num_control = sum(token == 2 for token in prompt.ids)
    assert num_control == asked.text.count("<|im_end|>") + 2


def test_another_effort_is_another_prompt() -> None:
    talk = Talk("harmony")
    talk.scribe = replace(talk.scribe, effort="low")
    asked = talk.asks(user("Where?"))
    assert "Reasoning: low" in asked.text
    talk.says(asked, talk.case.says)
    kept, damage = load(dump(talk.conversation), vocab_size=300)
    assert (kept, damage) == (talk.conversation, "")
    again = talk.asks(user("And?"))
    assert again.text.startswith(asked.text + talk.case.says)
    talk.scribe = replace(talk.scribe, effort="high")
    other = talk.conversation.prompt_of(talk.scribe, talk.messages)
    assert "Reasoning: high" in other.text
    assert "Reasoning: low" not in other.text
