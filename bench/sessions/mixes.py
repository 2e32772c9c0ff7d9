"""Apps that want more than there is: users who ask, read, think and ask again.

* **classes**: an interactive app with short prompts beside a background app that always has long
  prompts in the queue.
* **equals**: three apps of the same class and weight, whose users never pause, and whose demand
  differs: one has few users and short prompts, one has many and long ones.

Prompts and pauses are in units of a prefill that is measured first.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from edgekv.bench.figures import ttft_ms
from edgekv.bench.sessions.drive import Driver, Pause, User
from edgekv.bench.workload import TextIds, answer
from edgekv.config import Priority
from edgekv.runtime import App, Runtime

PHASE_UNITS = 40.0
_UNIT_TOKENS_MAX = 1024
_UNIT_TOKENS_MIN = 64
_UNIT_ROUNDS = 3
_UNIT_REPS = 5  # of which the median counts: others may be using the machine
_THINK_UNITS = 0.5
_ROUNDS = 10_000  # stretches of text set aside for each user


@dataclass(frozen=True, kw_only=True)
class AppLoad:
    """One app's users."""

    name: str  # the app's name
    priority: Priority = "interactive"  # its class
    weight: float = 1.0  # its share
    num_users: int  # each has one request at a time
    # Prompts are of lengths drawn evenly between these two, both included.
    prompt_tokens: tuple[int, int]
    output_tokens: int  # tokens of every answer
    # Mean of the exponential time between an answer's end and the next request.
    think_ms: float = 0.0


Mix = tuple[AppLoad, ...]


def users(load: AppLoad, app: App, driver: Driver, text: TextIds, seed: int) -> Iterator[User]:
    """An app's users, who never stop by themselves."""
    return (_user(number, load, app, driver, text, seed) for number in range(load.num_users))


def _user(number: int, load: AppLoad, app: App, driver: Driver, text: TextIds, seed: int) -> User:
    draw = random.Random(f"user {seed} {load.name} {number}")
    for round_ in itertools.count(number * _ROUNDS):
        if load.think_ms:
            yield Pause(draw.expovariate(1.0 / load.think_ms))
        ids = text.stretch(draw.randint(*load.prompt_tokens), round_)
        with app.session() as session:
            yield from driver.ask(load.name, session, ids, load.output_tokens)


def measure_unit(runtime: Runtime, context_max: int, phase_ms: float) -> tuple[int, float]:
    """What load is measured in: the prefill of a long prompt, alone.

    Returns:
        Tokens of the prompt of whose prefills `PHASE_UNITS` fit into a phase, or of the longest
        there is; and its time to the first token.
    """
    longest = max(1, min(_UNIT_TOKENS_MAX, context_max // 3))
    shortest = min(_UNIT_TOKENS_MIN, longest)
    text = TextIds(runtime.tokenizer)
    runs = itertools.count()

    def prefill_ms(num_tokens: int) -> float:
        number = next(runs)
        with runtime.app(f"unit {number}").session() as session:
            return ttft_ms(answer(session, text.stretch(num_tokens, number), 1).stats)

    tokens = shortest
    for _ in range(_UNIT_ROUNDS):  # the first one warms up, and a longer one tells more
        fits = tokens * phase_ms / PHASE_UNITS / prefill_ms(tokens)
        tokens = max(shortest, min(longest, 4 * tokens, int(fits)))
    return tokens, median(prefill_ms(tokens) for _ in range(_UNIT_REPS))


def make_mixes(unit_tokens: int, unit_ms: float) -> dict[str, Mix]:
    """The mixes, with prompts and pauses in proportion to the unit."""

    def prompts(*tokens: int) -> tuple[int, int]:
        low, high = (max(1, round(unit_tokens / _UNIT_TOKENS_MAX * n)) for n in tokens)
        return low, high

    interactive = AppLoad(
        name="interactive",
        num_users=1,
        prompt_tokens=prompts(64, 128),
        output_tokens=16,
        think_ms=_THINK_UNITS * unit_ms,
    )
    background = AppLoad(
        name="background",
        priority="background",
        num_users=8,
        prompt_tokens=prompts(768, 1280),
        output_tokens=32,
    )
    equals = tuple(
        AppLoad(name=name, num_users=num_users, prompt_tokens=prompts(*tokens), output_tokens=8)
        for name, num_users, tokens in (
            ("few-short", 4, (192, 256)),
            ("some-medium", 8, (256, 512)),
            ("many-long", 12, (512, 768)),
        )
    )
    return {"classes": (interactive, background), "equals": equals}
