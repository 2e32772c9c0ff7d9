"""When what is sent: arrivals that wait for nobody, and texts of their lengths. Pure.

Requests come by a Poisson process. Conversations are in their steady state from the first moment
(`draw_steady`); the times of all their turns are drawn before anything runs, and do not move if an
answer is late. Only a turn whose answer before is not there yet must wait for it. So every target
is sent the same, at the same times. The same arguments give the same schedule on every machine.
"""

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from edgekv.bench.serving.traffic import AppTraffic, Scenario
from edgekv.bench.sessions.conversations import (
    THINK_S_MEAN,
    ConversationShape,
    Talk,
    Turn,
    draw_conversations,
    draw_steady,
)
from edgekv.bench.workload import TEXT
from edgekv.errors import ConfigError

ARRIVALS_MAX = 100_000
_CHARS_MIN = 8
_WHOLE_TALKS = 256  # of an app, drawn at a time
_TOKENS_MAX_FACTOR = 2  # no conversation is longer than this times the mean


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """A conversation that will be held, or a request: a conversation of one turn."""

    app: str  # whose it is
    name: str  # unlike all others, so that no text begins as another does
    talk: Talk

    def due_ms(self) -> list[float]:
        """When each turn is sent, if the answer before is there."""
        pauses = itertools.accumulate(turn.think_ms for turn in self.talk.turns)
        return [self.talk.start_ms + pause for pause in pauses]


def draw_script(scenario: Scenario, *, rate: float, window_s: float, seed: int) -> list[Scripted]:
    """All that comes within a window at so many requests a second, in the order of its start.

    Raises ConfigError: There would be too many.
    """
    if rate * window_s > ARRIVALS_MAX:
        raise ConfigError(
            f"{rate:.3g} requests a second for {window_s:g} s are more than {ARRIVALS_MAX}",
            hint="lower --rate or --duration",
        )
    found = []
    for app in scenario.apps:
        own_rate = scenario.rate_of(app, rate)
        draw = _requests if app.kind == "requests" else _conversations
        talks = draw(app, own_rate, 1e3 * window_s, seed)
        found += [_scripted(app, number, talk, seed) for number, talk in enumerate(talks)]
    return sorted(found, key=lambda each: each.talk.start_ms)


def draw_mix(scenario: Scenario, seed: int) -> Iterator[Scripted]:
    """What is sent without end or pause to measure capacity: apps in turn, requests by share."""
    sources = {app.name: _whole_talks(app, seed) for app in scenario.apps}
    num_sent = dict.fromkeys(sources, 0.0)
    for number in itertools.count():
        # Who is furthest behind its share.
        app = min(scenario.apps, key=lambda each: num_sent[each.name] / each.share)
        talk = next(sources[app.name])
        num_sent[app.name] += len(talk.turns)
        yield _scripted(app, number, talk, seed, phase="mix")


def _scripted(app: AppTraffic, number: int, talk: Talk, seed: int, phase: str = "open") -> Scripted:
    return Scripted(app=app.name, name=f"{phase} {seed} {app.name} {number}", talk=talk)


def _requests(app: AppTraffic, rate: float, window_ms: float, seed: int) -> Iterator[Talk]:
    draw = random.Random(f"requests {seed} {app.name}")
    start_ms = 1e3 * draw.expovariate(rate)
    while start_ms < window_ms:
        yield _request(app, start_ms, draw)
        start_ms += 1e3 * draw.expovariate(rate)


def _request(app: AppTraffic, start_ms: float, draw: random.Random) -> Talk:
    turn = Turn(
        think_ms=0.0,
        input_tokens=draw.randint(*app.prompt_tokens),
        output_tokens=draw.randint(*app.output_tokens),
    )
    return Talk(start_ms=start_ms, turns=(turn,))


def _conversations(app: AppTraffic, rate: float, window_ms: float, seed: int) -> list[Talk]:
    cycle_ms = cycle_ms_of(app, rate)
    shape = _shape(app, app.users, 1e-3 * cycle_ms / THINK_S_MEAN, seed)
    return draw_steady(shape, cycle_ms=cycle_ms, window_ms=window_ms)


def cycle_ms_of(app: AppTraffic, rate: float) -> float:
    """From one turn of an open conversation to its next, so that all make `rate` turns a second."""
    # An open conversation will have so many turns for each time that it comes back.
    turns_per_return = 1.0 + 1.0 / _shape(app, app.users, 0.0, 0).returns_mean
    return 1e3 * app.users * turns_per_return / rate


def _whole_talks(app: AppTraffic, seed: int) -> Iterator[Talk]:
    if app.kind == "requests":
        draw = random.Random(f"mix {seed} {app.name}")
        while True:
            yield _request(app, 0.0, draw)
    for more in itertools.count(1):
        yield from draw_conversations(_shape(app, _WHOLE_TALKS, 0.0, -seed - more))


def _shape(app: AppTraffic, number: int, think_scale: float, seed: int) -> ConversationShape:
    return ConversationShape(
        num_sessions=number,
        turns_mean=app.turns,
        tokens_mean=app.session_tokens,
        tokens_max=_TOKENS_MAX_FACTOR * app.session_tokens,
        think_scale=think_scale,
        seed=zlib.crc32(f"{seed} {app.name}".encode()),
    )


@dataclass(frozen=True, kw_only=True)
class TextScale:
    """How long a text is in tokens, at a server that only says afterwards."""

    chars_per_token: float = 4.0
    num_fixed: float = 0.0  # tokens around it: the template's, and the question's

    @classmethod
    def of(cls, short: tuple[int, int], long: tuple[int, int]) -> "TextScale":
        """From two texts, each as (characters, tokens of the prompt)."""
        if long[0] <= short[0] or long[1] <= short[1]:
            return cls()
        per_token = (long[0] - short[0]) / (long[1] - short[1])
        return cls(chars_per_token=per_token, num_fixed=max(0.0, short[1] - short[0] / per_token))

    def num_chars(self, num_tokens: int) -> int:
        """Characters of a text whose prompt has about so many tokens."""
        return max(_CHARS_MIN, round((num_tokens - self.num_fixed) * self.chars_per_token))


def text_of(name: str, num_chars: int) -> str:
    """So many characters of real text, whose beginning no other name shares."""
    mark = zlib.crc32(name.encode())
    start = mark % len(TEXT)
    text = itertools.islice(itertools.cycle(TEXT), start, start + num_chars)
    return f"{mark:08x} " + "".join(text)
