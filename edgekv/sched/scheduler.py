"""The plan of the next step: who gets memory, who decodes, who prefills how many rows. Pure."""

from dataclasses import dataclass, field

from edgekv.sched.compose import arrivals_expected, compose
from edgekv.sched.cost import CostModel
from edgekv.sched.memory import plan_memory
from edgekv.sched.plan import RequestState, Snapshot, StepPlan
from edgekv.sched.policy import FairPolicy, Policy


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step, and who decides the order."""

    tbt_target_ms: float | None  # of a step with decoding sessions; see `tbt_target`
    prefill_rows_max: int
    policy: Policy = field(default_factory=FairPolicy)


def plan_step(
    now_ms: float, snapshot: Snapshot, cost: CostModel, config: SchedulerConfig
) -> StepPlan:
    """Decide the next step.

    Where memory must change first, the plan holds only that: the caller carries it out and asks
    again, so that segments are always planned for buffers that exist. A plan with neither means
    that whoever could compute is on the way in or out: the caller waits for I/O.
    """
    policy = config.policy
    order = policy.order(now_ms, snapshot, cost)
    memory = plan_memory(
        snapshot,
        order,
        lambda waiting, running: policy.may_preempt(waiting, running, now_ms, snapshot),
    )
    if memory:
        return StepPlan(memory=memory)
    ready = [r for r in order if r.computes]
    front: list[RequestState] = []
    back: list[RequestState] = []
    for request in ready:
        (back if policy.in_background(request, now_ms, snapshot) else front).append(request)
    return compose(
        front,
        back,
        cost,
        tbt_target_ms=config.tbt_target_ms,
        rows_max=config.prefill_rows_max,
        arrivals_expected=arrivals_expected(snapshot, now_ms),
        repairs=snapshot.repairs,
    )
