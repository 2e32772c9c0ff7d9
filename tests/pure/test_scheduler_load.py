"""What fair switching promises, on the make-believe engine: latency, shares, progress."""

import pytest
from sched_load import ClosedLoop, watch_shares
from sched_sim import SimSwap, Simulation

from edgekv.kv.layout import Heads, KVLayout
from edgekv.metrics import percentile
from edgekv.sched.cost import CostModel
from edgekv.sched.fairness import PATIENCE_MS, QUANTUM_MS
from edgekv.sched.policy import FairPolicy, FcfsPolicy, Policy
from edgekv.sched.scheduler import SchedulerConfig

LAYOUT = KVLayout(heads=(Heads(2, 64, 64), Heads(2, 64, 64)), dtype_bytes=4, context_max=1 << 14)
LAPTOP = CostModel(weights=(20.0, 2.0, 0.2))
SLOW = CostModel(weights=(45.0, 2.2, 2.0))
LARGE_POOL = 1 << 17  # tokens
SMALL_POOL = 6144
MACHINES = pytest.mark.parametrize("machine", [LAPTOP, SLOW], ids=["laptop", "slow"])
POOLS = pytest.mark.parametrize("pool", [LARGE_POOL, SMALL_POOL], ids=["roomy", "tight"])

pytestmark = pytest.mark.slow


def simulate(policy: Policy, machine: CostModel, pool_tokens: int) -> Simulation:
    config = SchedulerConfig(tbt_target_ms=100.0, prefill_rows_max=256, policy=policy)
    return Simulation(
        LAYOUT,
        LAYOUT.capacity_bytes(pool_tokens),
        config,
        cost_ms=machine.step_ms,
        cost=machine,
        swap=SimSwap(),
    )


def rows_per_s(simulation: Simulation) -> float:
    return 1e3 * simulation.num_rows / simulation.now_ms


class TestInteractiveBesideBackground:
    """A person who asks short questions beside an app that keeps eight long prompts queued."""

    FOR_MS = 90_000.0

    def play(self, policy: Policy, machine: CostModel, pool: int, *, alone: bool = False):
        simulation = simulate(policy, machine, pool)
        simulation.app("chat")
        simulation.app("batch", priority="background")
        chat = ClosedLoop(simulation, "chat", 1, (64, 128), (16, 32), think_ms=1000.0)
        if not alone:
            ClosedLoop(simulation, "batch", 8, (1000, 1500), (16, 64))
        simulation.run(20_000, self.FOR_MS)
        return simulation, chat

    @MACHINES
    @POOLS
    def test_its_first_tokens_come_nearly_as_soon_as_alone(self, machine, pool):
        _, alone = self.play(FairPolicy(), machine, pool, alone=True)
        fair_simulation, fair = self.play(FairPolicy(), machine, pool)
        fcfs_simulation, fcfs = self.play(FcfsPolicy(), machine, pool)
        alone_ms = percentile(alone.ttft_ms, 95)
        assert percentile(fair.ttft_ms, 95) <= 2.0 * alone_ms
        assert percentile(fcfs.ttft_ms, 95) > 20 * alone_ms, "the load is one"
        assert percentile(fair.gaps_ms, 95) <= 100.0
        assert rows_per_s(fair_simulation) >= 0.9 * rows_per_s(fcfs_simulation)

    @MACHINES
    def test_the_background_gets_the_rest(self, machine):
        simulation, chat = self.play(FairPolicy(), machine, SMALL_POOL)
        busy_ms = sum(simulation.service_ms.values())
        assert busy_ms > 0.95 * simulation.now_ms, "nobody waits while somebody could compute"
        assert simulation.service_ms["batch"] > 0.3 * busy_ms
        done = [r for r in simulation.finished if r.session.app == "batch"]
        assert len(done) >= 6
        assert max(r.num_preempted for r in done) < 2 * len(chat.requests)


class TestEqualApps:
    """Three apps of one class; the first asks little, the last much."""

    OUTSTANDING = (4, 8, 12)
    PROMPTS = ((192, 256), (256, 512), (512, 768))

    def play(self, policy: Policy, pool: int, weights=(1.0, 1.0, 1.0)):
        simulation = simulate(policy, LAPTOP, pool)
        names = ("a", "b", "c")
        for name, weight in zip(names, weights, strict=True):
            simulation.app(name, weight=weight)
        for name, count, prompt in zip(names, self.OUTSTANDING, self.PROMPTS, strict=True):
            ClosedLoop(simulation, name, count, prompt, (8, 16))
        shares = watch_shares(simulation)
        simulation.run(20_000, 60_000.0)
        assert sum(shares.values()) > 0.9 * simulation.now_ms, "they wait nearly always"
        total = sum(shares.values())
        owed = {n: w / sum(weights) for n, w in zip(names, weights, strict=True)}
        return simulation, {n: shares[n] / total / owed[n] for n in names}

    @POOLS
    def test_get_equal_service_and_cost_no_throughput(self, pool):
        fair, shares = self.play(FairPolicy(), pool)
        assert all(0.9 <= share <= 1.1 for share in shares.values()), shares
        fcfs, unfair = self.play(FcfsPolicy(), pool)
        assert min(unfair.values()) < 0.5, "the demand is unequal"
        assert rows_per_s(fair) >= 0.9 * rows_per_s(fcfs)

    @POOLS
    def test_get_service_by_weight(self, pool):
        _, shares = self.play(FairPolicy(), pool, weights=(4.0, 2.0, 1.0))
        assert all(0.9 <= share <= 1.1 for share in shares.values()), shares


class TestMoreSessionsThanMemory:
    def play(self, policy: Policy, num_sessions: int, swap: SimSwap | None) -> Simulation:
        """All at once, each a quantum or two of service, on a pool that holds five."""
        granule = LAYOUT.granule_tokens
        config = SchedulerConfig(tbt_target_ms=1000.0, prefill_rows_max=256, policy=policy)
        machine = CostModel(weights=(40.0, 10.0, 0.2))
        simulation = Simulation(
            LAYOUT,
            LAYOUT.capacity_bytes(5 * 2 * granule),
            config,
            cost_ms=machine.step_ms,
            cost=machine,
            swap=swap,
        )
        for i in range(num_sessions):
            simulation.request(simulation.session(), 30 + i % 40, 2 + i % 7, i / 100)
        simulation.run(10 * num_sessions)
        return simulation

    @pytest.mark.faults
    def test_five_hundred_on_a_pool_of_five_all_progress(self):
        simulation = self.play(FairPolicy(), 500, SimSwap())
        assert len(simulation.finished) == 500
        assert simulation.num_preemptions > 50, "they take turns"
        assert max(r.num_preempted for r in simulation.finished) <= 3
        first_ms = max(r.first_token_ms - r.arrival_ms for r in simulation.finished)
        assert first_ms < 0.85 * simulation.now_ms, "not one after another"

    @pytest.mark.parametrize("swap", [SimSwap(), None], ids=["swap", "recompute"])
    def test_switching_costs_little(self, swap):
        fair = self.play(FairPolicy(), 60, swap)
        fcfs = self.play(FcfsPolicy(), 60, swap)
        assert fair.now_ms <= fcfs.now_ms / 0.9


def test_two_sessions_that_need_the_whole_pool_take_turns_of_growing_length():
    """Not each step: a turn is worth its restore, and as long as all turns before."""
    simulation = simulate(FairPolicy(), LAPTOP, 1024)
    requests = [
        simulation.request(simulation.session(), 600, 300, 0.0, reserve_tokens=300)
        for _ in range(2)
    ]
    simulation.run(5000)
    service_ms = max(r.service_ms for r in requests)
    assert service_ms > 10 * QUANTUM_MS
    assert 2 <= simulation.num_preemptions <= 12
    assert all(r.num_preempted >= 1 for r in requests), "both gave way"


def test_a_background_app_gets_a_little_though_interactive_work_never_ends():
    """More interactive prompts come than the machine can ever compute."""
    simulation = simulate(FairPolicy(), LAPTOP, SMALL_POOL)
    simulation.app("chat")
    simulation.app("batch", priority="background")
    ClosedLoop(simulation, "chat", 12, (200, 400), (1, 2))
    batch = simulation.request(simulation.session("batch"), 500, 5, 0.0)
    simulation.run(5000, 60_000.0)
    assert batch.finished_ms is not None
    assert batch.finished_ms < 8 * PATIENCE_MS
    share = simulation.service_ms["batch"] / simulation.now_ms
    assert share < 2 * QUANTUM_MS / PATIENCE_MS


@pytest.mark.parametrize("num_apps", [1, 30])
def test_however_many_background_apps_wait_interactive_work_gets_nearly_all(num_apps):
    """What is guaranteed to each of thirty would be more than there is."""
    simulation = simulate(FairPolicy(), LAPTOP, LARGE_POOL)
    simulation.app("chat")
    ClosedLoop(simulation, "chat", 6, (200, 400), (16, 32))
    for number in range(num_apps):
        app = simulation.app(f"batch {number}", priority="background")
        ClosedLoop(simulation, app, 1, (400, 600), (1, 2))
    simulation.run(20_000, 60_000.0)
    shares = {app: ms / simulation.now_ms for app, ms in simulation.service_ms.items()}
    assert shares["chat"] > 0.85
    assert sum(shares.values()) - shares["chat"] > 0.5 * QUANTUM_MS / PATIENCE_MS
    assert sum(share > 0 for app, share in shares.items() if app != "chat") >= min(num_apps, 5)
