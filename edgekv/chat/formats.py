"""How models write calls and thoughts (so far: not at all)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edgekv.chat.answer import AnswerParser
from edgekv.chat.values import Tool


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """How a model writes calls and thoughts."""

    name: str
    spelled: frozenset[str] = frozenset()
    native: bool = True

    def tools_prompt(self, tools: Sequence[Tool]) -> str:
        """What a system prompt says of tools."""
        return ""

    def parser(self, *, tools: Sequence[Tool], opened: str = "") -> AnswerParser:
        """Of one answer."""
        return AnswerParser()


def answer_format(template: str, tokens: Collection[str]) -> AnswerFormat:
    """Of a model."""
    return AnswerFormat(name="plain")
