"""Apps that keep a runtime busy: each has users who ask, read, think and ask again."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from edgekv.bench.figures import ttft_ms
from edgekv.bench.sessions.drive import Driver, Pause, User
from edgekv.bench.workload import TextIds
from edgekv.config import Priority, SamplingParams
from edgekv.runtime import App, ReplyStream, Runtime

_ROUNDS = 10_000  # stretches of text set aside for each user


@dataclass(frozen=True, kw_only=True)
class AppLoad:
    """One app's users.

    Attributes:
        name: The app's name.
        priority: Its class.
        weight: Its share.
        num_users: Each has one request at a time.
        prompt_tokens: Prompts are of lengths drawn evenly between these two, both included.
        output_tokens: Tokens of every answer.
        think_ms: Mean of the exponential time between an answer's end and the next request.
    """

    name: str
    priority: Priority
    weight: float = 1.0
    num_users: int
    prompt_tokens: tuple[int, int]
    output_tokens: int
    think_ms: float = 0.0


@dataclass(kw_only=True)
class AppRecord:
    """What one app's users saw.

    A request that is not answered when time is up counts: with what came of it, and if nothing had
    come yet, with the time it had waited as its TTFT, which is less than it would have been. Else
    starving an app would remove the evidence.

    Attributes:
        ttft_ms: One for each request.
        gaps_ms: Between tokens of one answer.
        num_unanswered: Requests without a first token.
        num_tokens: Prompt tokens whose KV is there, and tokens of answers.
    """

    ttft_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    num_unanswered: int = 0
    num_tokens: int = 0

    def add(self, stream: ReplyStream, waited_ms: float) -> None:
        """Take in a request that has ended, perhaps because time was up."""
        reply = stream.reply
        if reply is None:
            return  # it failed; whoever waits for it hears of it
        answered = bool(reply.token_ids)
        self.ttft_ms.append(ttft_ms(reply.stats) if answered else waited_ms)
        self.gaps_ms += reply.gaps_ms
        self.num_unanswered += not answered
        self.num_tokens += stream.prefill_progress[0] + len(reply.token_ids)


class LoadedApp:
    """An app under load. Owned by the thread that drives it."""

    def __init__(
        self, load: AppLoad, runtime: Runtime, driver: Driver, text: TextIds, seed: int
    ) -> None:
        self.load = load
        self.record = AppRecord()
        self._app: App = runtime.app(load.name, weight=load.weight, priority=load.priority)
        self._driver = driver
        self._text = text
        self._seed = seed
        self._open: set[ReplyStream] = set()

    @property
    def backlogged(self) -> bool:
        """Whether a request of it waits for its prompt to be computed, all or in part."""
        return any(stream.prefill_progress[0] < stream.prefill_progress[1] for stream in self._open)

    def users(self) -> Iterator[User]:
        """Its users, who never stop by themselves."""
        return (self._user(number) for number in range(self.load.num_users))

    def _user(self, number: int) -> User:
        load = self.load
        draw = random.Random(f"user {self._seed} {load.name} {number}")
        sampling = SamplingParams(max_tokens=load.output_tokens, ignore_eos=True)
        for round_ in itertools.count(number * _ROUNDS):
            if load.think_ms:
                yield Pause(draw.expovariate(1.0 / load.think_ms))
            ids = self._text.stretch(draw.randint(*load.prompt_tokens), round_)
            with self._app.session() as session:
                submitted_ms = self._driver.now_ms
                stream = session.submit_ids(ids, sampling)
                self._open.add(stream)
                try:
                    yield stream
                finally:
                    self._open.remove(stream)
                    self.record.add(stream, self._driver.now_ms - submitted_ms)
