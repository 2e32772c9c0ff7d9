"""A conversation, the tools that it may use, and what is asked of it: frozen, hashable values."""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from edgekv.config import PrefillMode, Priority, SamplingParams
from edgekv.tokenizer.grammar import Grammar

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
ToolChoice = Literal["auto", "none", "required"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the model wants made.

    Attributes:
        call_id: By which its result refers to it.
        name: The tool's.
        arguments: A JSON object as text, as whoever wrote it wrote it.
    """

    call_id: str
    name: str
    arguments: str

    def result(self, content: str) -> "ChatMessage":
        """What came of it, as a message."""
        return ChatMessage(role="tool", content=content, call_id=self.call_id, name=self.name)


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One message of a conversation.

    Attributes:
        role: Whose it is; "tool" is the result of a call.
        content: Its text.
        reasoning: Of the assistant: what it thought before it spoke.
        tool_calls: Of the assistant: what it wants called.
        call_id: Of a tool's result: the call's.
        name: Of a tool's result: the tool's, if it is known.
    """

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may ask to be called.

    Attributes:
        name: By which the model calls it.
        description: What it does, for the model.
        parameters: JSON schema of its arguments, an object, as JSON text.
    """

    name: str
    description: str = ""
    parameters: str = '{"type":"object","properties":{}}'

    def schema(self) -> Any:
        """The parameters' JSON schema as plain values."""
        return json.loads(self.parameters)

    def to_function(self) -> dict[str, Any]:
        """As chat templates read it."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": self.schema()}}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What is asked: a conversation to be answered, or a text to be continued.

    Attributes:
        messages: The conversation, as whoever asks has it.
        prompt: Instead of messages: a text to continue as it is, without chat template.
        tools: What the model may ask to be called.
        tool_choice: "none" forbids calls, "required" wants at least one.
        tool_name: With "required": of this tool.
        parallel_tool_calls: Whether one answer may hold several calls.
        grammar: What the answer's text must match, its reasoning apart.
        thinking: Whether a model that can think first does; None leaves it to its template.
        effort: How much it does ("low", "medium", "high", ...); "" leaves that to its template.
        sampling: How tokens are chosen, where not as the model's makers say.
        session_key: Names the conversation among those of the app; "" finds it by what was said.
        priority: Of this request; None is the app's.
        prefill: Whether the prompt's KV is predicted; None is as the app or the runtime says.
    """

    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    tool_name: str = ""
    parallel_tool_calls: bool = True
    grammar: Grammar | None = None
    thinking: bool | None = None
    effort: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    session_key: str = ""
    priority: Priority | None = None
    prefill: PrefillMode | None = None

    def with_sampling(self, **fields: Any) -> "Completion":
        """The same with some of the sampling's fields changed."""
        return replace(self, sampling=replace(self.sampling, **fields))
