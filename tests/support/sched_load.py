"""Load for the make-believe engine: apps that ask again as soon as they are answered."""

import random
from dataclasses import dataclass, field

from sched_sim import Simulation
from sched_sim_parts import SimRequest


@dataclass(eq=False)
class ClosedLoop:
    """An app that keeps `num_outstanding` requests unfinished, each in a session of its own.

    Args:
        simulation: Where.
        app: A registered app.
        num_outstanding: Requests at any time.
        prompt: Tokens, from and to.
        output: Tokens, from and to.
        think_ms: Mean time between an answer and the next request, exponentially distributed.
        seed: Same seed, same requests.
    """

    simulation: Simulation
    app: str
    num_outstanding: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    think_ms: float = 0.0
    seed: int = 0
    requests: list[SimRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.app} {self.seed}")
        after = self.simulation.on_finish

        def on_finish(request: SimRequest) -> None:
            after(request)
            if request.session.app == self.app:
                request.session.capacity = request.session.num_valid = 0  # closed
                self._ask()

        self.simulation.on_finish = on_finish
        for _ in range(self.num_outstanding):
            self._ask()

    def _ask(self) -> None:
        wait_ms = self._random.expovariate(1.0) * self.think_ms
        request = self.simulation.request(
            self.simulation.session(self.app),
            self._random.randint(*self.prompt),
            self._random.randint(*self.output),
            self.simulation.now_ms + wait_ms,
        )
        self.requests.append(request)

    @property
    def ttft_ms(self) -> list[float]:
        """Of all that got a token."""
        return [r.first_token_ms - r.arrival_ms for r in self.requests if r.first_token_ms]

    @property
    def gaps_ms(self) -> list[float]:
        """Between tokens, of all."""
        return [gap for r in self.requests for gap in r.gaps_ms]


def watch_shares(simulation: Simulation) -> dict[str, float]:
    """Service by app that is given while all registered apps wait for more; filled as it runs."""
    shares = dict.fromkeys(simulation.apps, 0.0)
    before = dict(simulation.service_ms)
    all_waited = False

    def on_step() -> None:
        nonlocal before, all_waited
        now = dict(simulation.service_ms)
        if all_waited:
            for app in shares:
                shares[app] += now.get(app, 0.0) - before.get(app, 0.0)
        before = now
        all_waited = {*simulation.demand.waiting} >= {*shares}

    simulation.on_step = on_step
    return shares
