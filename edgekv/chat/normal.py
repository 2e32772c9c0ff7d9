"""Whether two messages are the same, however a client respells them."""

from edgekv.chat.values import ChatMessage


def same(ours: ChatMessage, theirs: ChatMessage) -> bool:
    """Whether a message is one that was sent before."""
    return ours.role == theirs.role and ours.content.strip() == theirs.content.strip()


def same_answer(ours: ChatMessage, theirs: ChatMessage) -> bool:
    """Whether a message is an answer that was given."""
    return ours.role == theirs.role and ours.content.strip() == theirs.content.strip()
