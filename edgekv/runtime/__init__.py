"""The embedding API: open a model once, share it between apps, talk in sessions.

    with edgekv.Runtime.open("smollm2-135m", pool_gib=1.0) as runtime:
        session = runtime.app("mail", priority="background").session("inbox")
        for delta in session.stream("Summarise: ..."):
            print(delta.text, end="")
        print(session.last_reply.stats)

Every method may be called from any thread; the `a…` twins from any asyncio loop.
"""

from edgekv.runtime.conversation import ChatMessage
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
]
