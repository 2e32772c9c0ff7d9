"""Functions that the model may call: it asks, they run, and it answers with what they said.

python tool_loop.py [MODEL]

Small models seldom choose well; one of 3B parameters or more does, such as Qwen2.5-3B-Instruct.
"""

import sys
from datetime import date
from typing import Literal

import edgekv
from edgekv.chat.events import CallBegun, CallDelta, TextDelta

STOCK = {"apples": 12, "pears": 0}


def in_stock(fruit: Literal["apples", "pears"]) -> int:
    """How many of a fruit there are."""
    return STOCK[fruit]


def today() -> str:
    """Today's date."""
    return date.today().isoformat()


with edgekv.Runtime.open(*sys.argv[1:]) as runtime:
    session = runtime.app("shop").session()

    # Names, docstrings and types tell the model what there is. What a function raises is told to
    # the model, too.
    reply = session.respond("Are there any pears?", tools=[in_stock, today])
    print(reply.text)

    # The same as it happens.
    for event in session.stream("And apples?", tools=[in_stock, today]):
        match event:
            case CallBegun(name=name):
                print(f"\n-> {name} ", end="")
            case CallDelta(arguments=text) | TextDelta(text=text):
                print(text, end="", flush=True)
    print()

    for message in session.messages:
        calls = ", ".join(f"{call.name}({call.arguments})" for call in message.tool_calls)
        print(f"{message.role:>9}: {message.content}{calls}")
