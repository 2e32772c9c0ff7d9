"""The embedding API: open a model once, share it between apps, talk in sessions.

    with edgekv.Runtime.open("smollm2-135m", pool_gib=1.0) as runtime:
        session = runtime.app("mail", priority="background").session("inbox")
        for delta in session.stream("Summarise: ..."):
            print(delta.text, end="")
        print(session.last_reply.stats)

Every method may be called from any thread; the `a…` twins from any asyncio loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgekv.chat.values import ChatMessage as ChatMessage

if TYPE_CHECKING:
    from edgekv.runtime.answers import AnswerStream as AnswerStream
    from edgekv.runtime.answers import AsyncAnswerStream as AsyncAnswerStream
    from edgekv.runtime.app import App as App
    from edgekv.runtime.keeper import SessionInfo as SessionInfo
    from edgekv.runtime.reply import AsyncReplyStream as AsyncReplyStream
    from edgekv.runtime.reply import Reply as Reply
    from edgekv.runtime.reply import ReplyStream as ReplyStream
    from edgekv.runtime.runtime import Runtime as Runtime
    from edgekv.runtime.session import Session as Session

_LAZY = {  # what imports MLX: a conversation can be read without it
    "AnswerStream": "edgekv.runtime.answers",
    "App": "edgekv.runtime.app",
    "AsyncAnswerStream": "edgekv.runtime.answers",
    "AsyncReplyStream": "edgekv.runtime.reply",
    "Reply": "edgekv.runtime.reply",
    "ReplyStream": "edgekv.runtime.reply",
    "Runtime": "edgekv.runtime.runtime",
    "Session": "edgekv.runtime.session",
    "SessionInfo": "edgekv.runtime.keeper",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgekv.runtime' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
