"""Scripts of what users do, drawn from a seed, and a player that lets them happen in a world.

A script says everything in advance, prompts included: the model's answers are known. So the same
script can be played on a whole disk and on a broken one, and nothing but the disk differs.
"""

import random
from dataclasses import dataclass
from typing import Literal

from sim_model import VOCAB_SIZE, answer_to
from sim_world import Asked, SimSession, World

Kind = Literal[
    "ask", "cancel", "close", "turns", "io", "settle", "suspend", "pressure", "restart", "crash"
]
NUM_APPS = 2
NUM_UNNAMED = 3
HISTORY_MAX = 200


@dataclass(frozen=True)
class Op:
    """One thing that happens."""

    kind: Kind
    who: tuple[str, str] = ("", "")
    prompt: tuple[int, ...] = ()
    number: float = 0


def script(
    seed: int,
    num_ops: int,
    *,
    lives: bool = True,
    crashes: bool = False,
    restless: bool = False,
    num_named: int = 5,
) -> list[Op]:
    """What happens, in order.

    Args:
        seed: Of all that is drawn.
        num_ops: How many things happen.
        lives: The process ends and begins again, in order.
        crashes: And out of order.
        restless: Users change their minds most of the time.
        num_named: Sessions with a name, in each app; there are three without one.
    """
    writer = _Writer(random.Random(seed), num_named)
    weights: dict[Kind, int] = {"ask": 40, "turns": 25, "cancel": 5, "close": 6, "io": 6}
    if restless:
        weights |= {"cancel": 20, "close": 20}
    weights |= {"settle": 4, "suspend": 3, "pressure": 2}
    weights |= {"restart": 2 * lives, "crash": 2 * crashes}
    kinds = random.Random(seed + 1).choices(list(weights), list(weights.values()), k=num_ops)
    return [writer.write(kind) for kind in kinds] + [Op("settle")]


class _Writer:
    def __init__(self, draw: random.Random, num_named: int) -> None:
        self._draw = draw
        self._num_named = num_named
        self._histories: dict[tuple[str, str], tuple[int, ...]] = {}
        self._systems = [self._ids(45) for _ in range(NUM_APPS)]

    def _ids(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(VOCAB_SIZE) for _ in range(num_tokens))

    def _someone(self) -> tuple[str, str]:
        app = self._draw.randrange(NUM_APPS)
        number = self._draw.randrange(self._num_named + NUM_UNNAMED)
        return f"app-{app}", f"s{number}" if number < self._num_named else f"#{number}"

    def write(self, kind: Kind) -> Op:
        if kind == "ask":
            return self._ask()
        if kind in {"cancel", "close"}:
            return Op(kind, self._someone())
        if kind == "pressure":
            return Op(kind, number=self._draw.choice([0.4, 0.7, 1.0, 1.0]))
        return Op(kind, number=self._draw.randrange(1, 12))

    def _ask(self) -> Op:
        who = self._someone()
        history = self._histories.get(who, ())
        if self._draw.random() < 0.2:  # edited
            history = history[: self._draw.randrange(len(history) + 1)]
        if len(history) > HISTORY_MAX:
            history = history[: len(self._systems[0]) + 5]
        if not history and self._draw.random() < 0.8:
            history = self._systems[int(who[0][-1])]
        prompt = history + self._ids(self._draw.choice([1, 5, 20, 60, 110]))
        num_tokens = self._draw.choice([0, 1, 3, 8, 8, 30])  # 0 only warms up
        self._histories[who] = prompt + answer_to(prompt, num_tokens)
        return Op("ask", who, prompt, num_tokens)


class Player:
    """Lets a script happen in a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._unnamed: dict[tuple[str, str], SimSession] = {}
        self._last: dict[tuple[str, str], Asked] = {}

    def play(self, ops: list[Op]) -> None:
        for op in ops:
            getattr(self, op.kind)(op)

    def _session(self, who: tuple[str, str]) -> SimSession:
        app, name = who
        if not name.startswith("#"):
            return self.world.session(app, name)
        if who not in self._unnamed:
            self._unnamed[who] = self.world.session(app)
        return self._unnamed[who]

    def ask(self, op: Op) -> None:
        if len(op.prompt) >= self.world.loop.ledger.tokens_max:
            return
        before = self._last.get(op.who)
        if before is not None:
            self.world.until_ended(before)
        self._last[op.who] = self.world.ask(self._session(op.who), op.prompt, int(op.number))

    def cancel(self, op: Op) -> None:
        asked = self._last.get(op.who)
        if asked is not None:
            self.world.cancel(asked)

    def close(self, op: Op) -> None:
        if op.who in self._unnamed:
            self.world.close_session(self._unnamed.pop(op.who))
        elif op.who in self.world.sessions:
            self.world.close_session(self.world.sessions[op.who])

    def turns(self, op: Op) -> None:
        self.world.turns(int(op.number))

    def io(self, op: Op) -> None:
        for _ in range(int(op.number)):
            self.world.io.step()

    def settle(self, op: Op) -> None:
        self.world.settle()

    def suspend(self, op: Op) -> None:
        self.world.suspend_all()

    def pressure(self, op: Op) -> None:
        self.world.pressure(op.number)

    def restart(self, op: Op) -> None:
        if op.number > 6:
            self.world.settle()
        self.world.restart()
        self.forget()

    def crash(self, op: Op) -> None:
        self.world.crash()
        self.forget()

    def forget(self) -> None:
        self._unnamed.clear()
        self._last.clear()
