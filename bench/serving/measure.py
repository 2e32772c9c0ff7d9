"""What the first target can do, in requests that are like those that will come."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from edgekv.bench.serving.client import TargetFailed
from edgekv.bench.serving.play import Player
from edgekv.bench.serving.schedule import TextScale, draw_mix
from edgekv.bench.serving.stream import Answer
from edgekv.bench.serving.traffic import AppTraffic, Scenario

UNIT_TOKENS = (256, 1024)  # the shortest unit and the longest
UNITS_PER_WINDOW = 40.0
_UNIT_ROUNDS = 3
_UNIT_GROWTH = 2
_SCALE_CHARS = (64, 1024)
FEW_TOKENS = 8  # of an answer of which the beginning matters; the first may have no text
_NUM_ALONE = 3
_NUM_USERS = 4  # who are busy while capacity is measured


async def measure_scale(player: Player, app: AppTraffic) -> TextScale:
    """How many characters a token has here. Raises TargetFailed."""
    seen = []
    for number, num_chars in enumerate(_SCALE_CHARS):
        name = f"scale {number}"
        answer = whole(await player.ask_once(app.name, name, num_chars, FEW_TOKENS))
        seen.append((num_chars, answer.num_prompt_tokens or 0))
    return TextScale.of(*seen)


async def measure_unit(player: Player, app: AppTraffic, scale: TextScale, window_s: float) -> int:
    """Tokens of a prompt of whose prefills so many fill a window, or of the longest there is."""
    shortest, longest = UNIT_TOKENS
    tokens = shortest
    for number in range(_UNIT_ROUNDS):
        num_chars = scale.num_chars(tokens)
        answer = whole(await player.ask_once(app.name, f"unit {number}", num_chars, FEW_TOKENS))
        fits = tokens * 1e3 * window_s / UNITS_PER_WINDOW / (answer.ttft_ms or answer.total_ms)
        tokens = max(shortest, min(longest, _UNIT_GROWTH * tokens, int(fits)))
    return tokens


async def measure_alone(
    player: Player, scenario: Scenario, scale: TextScale, seed: int
) -> Mapping[str, float]:
    """Median TTFT of each app's requests, one by one and with nobody beside."""
    found = {}
    for app in scenario.apps:
        own = draw_mix(replace(scenario, apps=(app,)), seed)
        times = []
        for each in itertools.islice(own, _NUM_ALONE):
            (turn, *_), name = each.talk.turns, f"alone {each.name}"
            num_chars = scale.num_chars(turn.input_tokens)
            answer = whole(await player.ask_once(app.name, name, num_chars, turn.output_tokens))
            times.append(answer.ttft_ms or answer.total_ms)
        found[app.name] = median(times)
    return found


async def measure_capacity(player: Player, scenario: Scenario, seed: int, for_s: float) -> float:
    """Requests a second of a few users who never pause, in the apps' proportion."""
    mix = draw_mix(scenario, seed)
    served, elapsed_s = await player.play_closed(mix, num_users=_NUM_USERS, for_s=for_s)
    num_whole = sum(each.answer.fault is None for each in served)
    if not num_whole:
        whole(served[0].answer)
    return num_whole / elapsed_s


def whole(answer: Answer) -> Answer:
    """The answer. Raises TargetFailed: with nobody beside it, it was not whole."""
    if answer.fault is not None:
        raise TargetFailed(
            f"a request that was alone failed: {answer.fault}",
            hint="try the server with one request; a busy one cannot be measured",
        )
    return answer
