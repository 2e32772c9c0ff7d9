"""Residency as a state machine: a whole engine and a real store, and whatever happens to them.

Hypothesis chooses what users do, how far the engine and the disk get in between, and shrinks what
fails to the shortest story. The world checks every answer and every byte of KV that a step reads.
"""

import pathlib
import tempfile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sim_model import MODELS, VOCAB_SIZE, answer_to
from sim_world import Asked, Options, World

from edgekv.kv.residency import Residency

USERS = [("app-0", "a"), ("app-0", "b"), ("app-1", "a"), ("app-1", "b")]
HISTORY_MAX = 200
MODES = ["reuse", "reuse", "async", "groups", "off"]


class ResidencyMachine(RuleBasedStateMachine):
    """Four sessions of two apps in memory for one or two."""

    @initialize(
        mode=st.sampled_from(MODES),
        pool_tokens=st.sampled_from([320, 384, 448]),
        io_share=st.sampled_from([0.0, 0.15, 0.5]),
        num_staging=st.sampled_from([0, 2, 8]),
        seed=st.integers(0, 3),
        model=st.sampled_from([*MODELS]),
    )
    def begin(self, mode, pool_tokens, io_share, num_staging, seed, model):
        self.folder = tempfile.TemporaryDirectory()
        options = Options(
            mode=mode,
            pool_tokens=pool_tokens,
            io_share=io_share,
            num_staging=num_staging,
            model=model,
        )
        self.world = World(pathlib.Path(self.folder.name) / "kv", seed=seed, options=options)
        self.histories = dict.fromkeys(USERS, ())
        self.last: dict[tuple[str, str], Asked] = {}

    @rule(
        who=st.sampled_from(USERS),
        kept=st.floats(0.0, 1.0),
        new=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=80),
        num_tokens=st.integers(0, 12),
    )
    def ask(self, who, kept, new, num_tokens):
        """A next turn, or one behind an edited history; 0 tokens only warm up."""
        if who in self.last:
            self.world.until_ended(self.last[who])
        history = self.histories[who]
        if kept < 0.3 or len(history) > HISTORY_MAX:
            history = history[: int(kept * len(history))]
        prompt = history + tuple(new)
        if len(prompt) + num_tokens >= self.world.loop.ledger.tokens_max:
            return
        self.last[who] = self.world.ask(self.world.session(*who), prompt, num_tokens)
        self.histories[who] = prompt + answer_to(prompt, num_tokens)

    @rule(who=st.sampled_from(USERS))
    def cancel(self, who):
        if who in self.last:
            self.world.cancel(self.last[who])

    @rule(who=st.sampled_from(USERS))
    def close(self, who):
        if who in self.world.sessions:
            self.world.close_session(self.world.sessions[who])

    @rule(count=st.integers(1, 12))
    def turns(self, count):
        self.world.turns(count)

    @rule(count=st.integers(1, 8))
    def disk(self, count):
        for _ in range(count):
            self.world.io.step()

    @rule()
    def suspend(self):
        self.world.suspend_all()

    @rule(fraction=st.sampled_from([0.4, 0.7, 1.0]))
    def pressure(self, fraction):
        self.world.pressure(fraction)

    @rule()
    def settle(self):
        self.world.settle()

    @rule(orderly=st.booleans())
    def end_and_begin_again(self, orderly):
        (self.world.restart if orderly else self.world.crash)()
        self.last.clear()

    @invariant()
    def who_moves_is_nobody_s_victim(self):
        if not hasattr(self, "world"):
            return
        for session in self.world.loop.ledger.sessions.values():
            kv = session.kv
            holding = {Residency.RESIDENT, Residency.ARRIVING}
            leaves = kv.residency is Residency.LEAVING and session in self.world.swap.leaving
            assert kv.buffers is None or kv.residency in holding or leaves
            assert kv.stored <= kv.handed <= kv.num_tokens
        snapshot = self.world.pool.snapshot()
        assert snapshot.allocated_bytes <= snapshot.budget_bytes

    def teardown(self):
        if hasattr(self, "world"):
            self.world.settle()
            self.world.everything_again()
            self.world.close_all()
            self.world.close()
            self.folder.cleanup()


TestResidency = pytest.mark.slow(pytest.mark.faults(ResidencyMachine.TestCase))
TestResidency.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, derandomize=True
)
