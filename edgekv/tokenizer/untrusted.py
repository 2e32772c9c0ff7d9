"""Keeps the words of a conversation from forging its structure."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

# A private-use character: no template tests for it, and trimming leaves it alone.
_MARK = "\ue000"


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of `texts` as one group, or nothing at all if there are none."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")


def mark_forgeries(
    messages: Sequence[Mapping[str, str]], control: re.Pattern[str]
) -> tuple[Sequence[Mapping[str, str]], str]:
    """Break up control tokens that are spelled out inside of messages.

    Args:
        messages: A conversation; each message has `role` and `content`.
        control: Matches any control token's text.

    Returns:
        The conversation with a mark behind the first character of each such token, and the mark,
        which no message holds; the messages themselves and "" if there is no such token.
    """
    texts = [text for message in messages for text in message.values()]
    if not any(map(control.search, texts)):
        return messages, ""
    runs = re.findall(f"{_MARK}+", "\n".join(texts))
    mark = _MARK * (1 + max(map(len, runs), default=0))

    def break_up(text: str) -> str:
        return control.sub(lambda match: match[0][0] + mark + match[0][1:], text)

    return [{k: break_up(text) for k, text in message.items()} for message in messages], mark


def split_marked(text: str, control: re.Pattern[str], mark: str) -> Iterator[tuple[str, bool]]:
    """Cut rendered text into what is a control token (True) and what is not, marks removed."""
    # A capturing split alternates: text, control token, text, ..., text.
    for index, part in enumerate(control.split(text)):
        yield part.replace(mark, ""), index % 2 == 1
