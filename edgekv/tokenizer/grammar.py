"""What an answer must look like, token by token."""

from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What an answer's text must match.

    Attributes:
        kind: How `text` is to be read. "json_object" is any JSON object.
        text: A JSON schema as JSON text, a regular expression, or a grammar in llguidance's Lark.
        after: The text is free until it holds this, and must match from there ("</think>").
        lead: What must come before, then: a grammar in Lark, whose end `@text` is what must match.
        control: Control tokens, of which rules in Lark speak as `control_0` and so on. Within
            strings they are plain characters.
    """

    kind: GrammarKind
    text: str = ""
    after: str = ""
    lead: str = ""
    control: tuple[str, ...] = ()
