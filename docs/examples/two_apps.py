"""Two apps and three sessions that share one model, with asyncio.

python two_apps.py [MODEL]
"""

import asyncio
import sys

import edgekv

SHORT = edgekv.SamplingParams(max_tokens=60)


async def ask(session: edgekv.Session, text: str) -> None:
    reply = await session.arespond(text, sampling=SHORT)
    print(f"[{session.app.name}/{session.name}] {reply.text}")
    print(f"  first token after {reply.stats.ttft_ms:.0f} ms")


async def main() -> None:
    with edgekv.Runtime.open(*sys.argv[1:]) as runtime:
        # Who waits at the screen goes before what runs behind it, and twice the weight is twice
        # the service among equals.
        editor = runtime.app("editor", weight=2.0)
        mail = runtime.app("mail", priority="background")
        await asyncio.gather(  # all three are answered in the same steps of the model
            ask(editor.session("draft"), "Suggest a title for a story about the sea."),
            ask(editor.session("notes"), "What is a haiku?"),
            ask(mail.session("inbox"), "Write one polite line that declines an invitation."),
        )
        # A session remembers: of this turn only the question is new to the model.
        await ask(editor.session("notes"), "Write one.")


asyncio.run(main())
