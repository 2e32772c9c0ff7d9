"""The scheduler as a state machine: apps, requests, cancellations and pressure at random.

The make-believe engine asserts at every plan what a plan promises; here is what must hold beyond
one plan: the accounts agree with the service that was given, and everybody ends.
"""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sched_sim import MACHINE, Simulation
from sched_sim_parts import SimSwap

from edgekv.kv.layout import PAGE_BYTES, Heads, KVLayout, StateArray
from edgekv.sched.policy import policy_of
from edgekv.sched.scheduler import SchedulerConfig

LAYOUT = KVLayout(heads=(Heads(2, 64, 64), Heads(4, 64, 64)), dtype_bytes=4, context_max=2048)
# Of a model with a state, sessions own a granule of one more kind.
STATES = (StateArray((PAGE_BYTES // 4,), "float32"),)
LAYOUTS = (LAYOUT, replace(LAYOUT, states=((), STATES)))
GRANULE_BYTES = LAYOUT.capacity_bytes(LAYOUT.granule_tokens)
APPS = ("chat", "mail", "batch")
SLOW_SWAP = SimSwap(restore_ms_per_token=0.5, leave_ms_per_token=0.5)


class SchedulerMachine(RuleBasedStateMachine):
    """Whatever is asked of it, in whatever order."""

    @initialize(
        policy=st.sampled_from(["fair", "fair", "fcfs"]),
        swap=st.sampled_from([None, SimSwap(), SLOW_SWAP]),
        num_granules=st.integers(4, 30),
        odd_bytes=st.integers(0, 70_000),
        layout=st.sampled_from(LAYOUTS),
    )
    def begin(self, policy, swap, num_granules, odd_bytes, layout):
        config = SchedulerConfig(tbt_target_ms=50.0, prefill_rows_max=128, policy=policy_of(policy))
        budget_bytes = num_granules * GRANULE_BYTES + odd_bytes
        # A slower machine than it looks: turns end, apps age.
        self.simulation = Simulation(
            layout,
            budget_bytes,
            config,
            cost_ms=lambda shape: 10 * MACHINE.step_ms(shape),
            swap=swap,
        )
        for name in APPS:
            self.simulation.app(name, priority="background" if name == "batch" else "interactive")
        self.crowds = {}
        self.sessions = {name: [self.simulation.session(name) for _ in range(3)] for name in APPS}

    @rule(
        app=st.sampled_from(APPS),
        session=st.integers(0, 2),
        prompt=st.integers(1, 700),
        output=st.integers(1, 60),
        later_ms=st.floats(0, 400),
    )
    def ask(self, app, session, prompt, output, later_ms):
        prompt = min(prompt, self.simulation.tokens_max - 1)
        at_ms = self.simulation.now_ms + later_ms
        self.simulation.request(self.sessions[app][session], prompt, output, at_ms)

    @rule(app=st.sampled_from(APPS), count=st.integers(10, 30), prompt=st.integers(1, 100))
    def flood(self, app, count, prompt):
        """More than a plan looks at, of sessions that may have KV already."""
        crowd = self.crowds.setdefault(app, [])
        crowd += [self.simulation.session(app) for _ in range(count - len(crowd))]
        for number, session in enumerate(crowd[:count]):
            at_ms = self.simulation.now_ms + number
            self.simulation.request(session, prompt + number, 2, at_ms)

    @rule(count=st.integers(1, 40))
    def turns(self, count):
        for _ in range(count):
            if self.simulation.waiting or self.simulation.running:
                self.simulation.turn()

    @precondition(lambda self: self.simulation.running)
    @rule(data=st.data())
    def cancel(self, data):
        still = [r for r in self.simulation.running.values() if r.arriving_until_ms is None]
        if still:
            self.simulation.cancel(data.draw(st.sampled_from(still)))

    @rule(
        app=st.sampled_from(APPS),
        weight=st.sampled_from([0.01, 0.5, 1.0, 1000.0]),
        pinned=st.integers(0, 10),
    )
    def change_terms(self, app, weight, pinned):
        priority = self.simulation.accounts.app(app).priority
        self.simulation.app(
            app, weight=weight, priority=priority, pinned_bytes=pinned * GRANULE_BYTES
        )

    @rule(part=st.sampled_from([None, 0.3, 0.6]))
    def system_is_short_of_memory(self, part):
        budget = self.simulation.budget_bytes
        self.simulation.soft_budget_bytes = None if part is None else int(part * budget)

    @invariant()
    def memory_is_within_the_budget(self):
        assert self.simulation.used_bytes <= self.simulation.budget_bytes

    @invariant()
    def nobody_computes_without_memory(self):
        for request in self.simulation.running.values():
            if request.admitted:
                assert request.session.capacity >= request.num_computed

    @invariant()
    def virtual_time_never_falls(self):
        virtual_ms = {n: a.virtual_ms for n, a in self.simulation.accounts.apps.items()}
        before = getattr(self, "virtual_ms", virtual_ms)
        assert all(virtual_ms.get(name, before[name]) >= before[name] for name in before)
        self.virtual_ms = virtual_ms

    def teardown(self):
        rows = sum(
            r.num_prompt + r.num_output
            for r in (*self.simulation.waiting, *self.simulation.running.values())
        )
        self.simulation.run(self.simulation.num_steps + 100 + 20 * rows)
        done = self.simulation.finished
        assert all(r.num_tokens == r.num_prompt + r.num_output for r in done)


SchedulerMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, derandomize=True, deadline=None
)
TestSchedulerMachine = pytest.mark.slow(SchedulerMachine.TestCase)
