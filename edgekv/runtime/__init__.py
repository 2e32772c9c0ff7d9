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

from edgekv.runtime.conversation import ChatMessage

_LAZY = {  # what imports MLX: a conversation can be read without it
    "App": "edgekv.runtime.runtime",
    "AsyncReplyStream": "edgekv.runtime.reply",
    "Reply": "edgekv.runtime.reply",
    "ReplyStream": "edgekv.runtime.reply",
    "Runtime": "edgekv.runtime.runtime",
    "Session": "edgekv.runtime.session",
    "SessionInfo": "edgekv.runtime.keeper",
}

if TYPE_CHECKING:
    from edgekv.runtime.keeper import SessionInfo
    from edgekv.runtime.reply import AsyncReplyStream, Reply, ReplyStream
    from edgekv.runtime.runtime import App, Runtime
    from edgekv.runtime.session import Session

__all__ = [
    "App",
    "AsyncReplyStream",
    "ChatMessage",
    "Reply",
    "ReplyStream",
    "Runtime",
    "Session",
    "SessionInfo",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgekv.runtime' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
