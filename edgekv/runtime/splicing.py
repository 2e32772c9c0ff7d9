"""What a template writes behind an answer, found out by rendering, whatever it makes of the answer.

An answer's tokens stay those that were generated. What follows them is what the template writes
behind such an answer: the end of its turn, and all that was said later.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from edgekv.chat.formats import without_empty_thoughts
from edgekv.chat.values import ChatMessage
from edgekv.errors import ChatTemplateError
from edgekv.tokenizer import RenderedChat, Tokenizer

Write = Callable[[Sequence[ChatMessage], bool], RenderedChat]  # with a generation prompt or without
# In the place of an answer, or in front of what follows one.
_MARK = "\ue000\ue001edgekv\ue001\ue000"


def behind_answer(
    write: Write,
    tokenizer: Tokenizer,
    known: Sequence[ChatMessage],
    messages: Sequence[ChatMessage],
    *,
    answer: bool,
) -> RenderedChat | None:
    """What stands behind the answer to `known`; None where that cannot be told.

    Args:
        write: How the conversation is written.
        tokenizer: Which tokens end answers.
        known: The messages before it.
        messages: It, and all later ones.
        answer: Whether the last one is to be answered.
    """
    find = _behind_calls if messages[0].tool_calls else _behind_text
    try:
        found = find(write, tokenizer, known, messages, answer)
    except ChatTemplateError:  # it wants to see what was left out
        return None
    if found is None:
        return None
    whole, start = found
    tainted = [(a - start, b - start) for a, b in whole.tainted if a >= start]
    return replace(whole, text=whole.text[start:], tainted=tainted)


_Found = tuple[RenderedChat, int] | None  # all of it, and where the answer ends


def _behind_text(
    write: Write,
    tokenizer: Tokenizer,
    known: Sequence[ChatMessage],
    messages: Sequence[ChatMessage],
    answer: bool,
) -> _Found:
    """With a mark in the answer's place."""
    del tokenizer  # the mark shows where the answer ends
    marked = ChatMessage(role="assistant", content=_MARK)
    whole = write((*known, marked, *messages[1:]), answer)
    before, _, behind = whole.text.partition(_MARK)
    if not behind or _MARK in behind:
        return None
    return (whole, len(before) + len(_MARK)) if _goes_on(before, _begun(write, known)) else None


def _behind_calls(
    write: Write,
    tokenizer: Tokenizer,
    known: Sequence[ChatMessage],
    messages: Sequence[ChatMessage],
    answer: bool,
) -> _Found:
    """With the answer as it is, for results need their calls, and a mark in front of what follows.

    What ends answers stands between the two; the last such token does, for a template may write
    several calls as several answers.
    """
    if len(messages) == 1:
        return None
    said, result, *later = messages
    said, marked = replace(said, reasoning=""), replace(result, content=_MARK + result.content)
    before, found, _ = write((*known, said, marked, *later), answer).text.partition(_MARK)
    whole = write((*known, said, result, *later), answer)
    begun = _begun(write, known)
    if not found or not _goes_on(before, begun) or not whole.text.startswith(before):
        return None
    ends = filter(None, (tokenizer.vocabulary.tokens[i] for i in tokenizer.eos_ids))
    start = max((before.rfind(end, len(begun)) for end in ends), default=-1)
    forged = any(a <= start < b for a, b in whole.tainted)
    return None if start < 0 or forged else (whole, start)


def _begun(write: Write, known: Sequence[ChatMessage]) -> str:
    """The conversation up to where an answer is opened, which templates do in several ways."""
    asked, closed = write(known, True).text, write(known, False).text
    if asked.startswith(closed):
        return closed
    pairs = enumerate(zip(asked, closed, strict=False))
    return asked[: next((at for at, (one, other) in pairs if one != other), len(asked))]


def _goes_on(text: str, begun: str) -> bool:
    """Whether what is rendered goes on from there, whatever it has where nothing was thought."""
    return text.startswith(begun) or without_empty_thoughts(text).startswith(
        without_empty_thoughts(begun)
    )
