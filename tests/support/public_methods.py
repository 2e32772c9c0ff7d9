"""Every public method of an object, with arguments that are allowed: to see that all of them do."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

# A method that is not here is called without arguments; one that needs some must come here.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "logits": ([1, 2],),
    "score": ([1, 2],),
    "respond": ("Hi",),
    "arespond": ("Hi",),
    "stream": ("Hi",),
    "astream": ("Hi",),
    "complete": ("Hi",),
    "acomplete": ("Hi",),
    "count_tokens": ("Hi",),
    "knows": ("inbox-0",),
    "submit_ids": ([1, 2],),
    "remove": ("inbox-0",),
}


def public_methods(thing: object) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of each; what is async is run to its end."""
    for name, function in inspect.getmembers(type(thing), inspect.isfunction):
        if name.startswith("_"):
            continue
        call = functools.partial(getattr(thing, name), *ARGUMENTS.get(name, ()))
        if inspect.iscoroutinefunction(function):
            yield name, lambda call=call: asyncio.run(call())
        else:
            yield name, call
