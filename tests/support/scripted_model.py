"""A model that says what a test wants: a tiny one whose answers a grammar spells out.

All else is real: prompts are encoded and computed, KV is kept and found again, answers are sampled.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

from edgekv.chat.values import Completion
from edgekv.runtime.completions import Completions
from edgekv.tokenizer.grammar import Grammar

Script = Callable[[Completion], str]


@contextlib.contextmanager
def scripted(script: Script) -> Iterator[list[Completion]]:
    """While inside, completions are answered by `script`; yields what was asked."""
    asked_so_far: list[Completion] = []
    grammar_of = Completions._grammar

    def spelled(self: Completions, asked: Completion, prompt: str) -> Grammar | None:
        asked_so_far.append(asked)
        wanted = grammar_of(self, asked, prompt)  # what cannot be compiled is still refused
        if wanted is not None:
            return wanted
        return Grammar(kind="regex", text=re.escape(script(asked)))

    Completions._grammar = spelled  # type: ignore[method-assign]
    try:
        yield asked_so_far
    finally:
        Completions._grammar = grammar_of  # type: ignore[method-assign]


def said_last(asked: Completion) -> str:
    """What the user said last, or a tool."""
    return asked.messages[-1].content
