"""Random arrivals and small pools: plans keep their promises, and every request ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_sim import Simulation

from edgekv.kv.layout import KVLayout
from edgekv.sched.scheduler import SchedulerConfig

LAYOUT = KVLayout(heads=((2, 64), (4, 64)), dtype_bytes=4, context_max=4096)
GRANULE = LAYOUT.granule_tokens
CONFIG = SchedulerConfig(tbt_target_ms=50.0, prefill_rows_max=128)

arrivals = st.lists(
    st.tuples(
        st.integers(0, 5),  # session
        st.integers(1, 900),  # prompt
        st.integers(1, 300),  # output
        st.floats(0, 3000),  # arrival
        st.sampled_from(["interactive", "background"]),
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.slow
@settings(max_examples=60, derandomize=True, deadline=None)
@given(requests=arrivals, num_granules=st.integers(6, 40), odd_bytes=st.integers(0, 70_000))
def test_every_request_ends_in_any_pool_that_can_hold_it(requests, num_granules, odd_bytes):
    budget_bytes = LAYOUT.capacity_bytes(num_granules * GRANULE) + odd_bytes
    simulation = Simulation(LAYOUT, budget_bytes, CONFIG)
    sessions = [simulation.session() for _ in range(6)]
    for session, prompt, output, arrival_ms, priority in requests:
        prompt = min(prompt, simulation.tokens_max - 1)
        simulation.request(sessions[session], prompt, output, arrival_ms, priority=priority)
    rows = sum(r.num_prompt + r.num_output for r in simulation.waiting)
    simulation.run(steps_max=20 * rows)
    assert len(simulation.finished) == len(requests)
    assert all(r.finished_ms is not None for r in simulation.finished)
