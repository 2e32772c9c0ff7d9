"""What each app has right now."""

from tiny_models import random_ids
from tiny_runtime import answer, eventually, sampling

from edgekv.metrics import AppUsage


def test_requests_sessions_and_memory_are_those_of_their_app(open_runtime):
    runtime = open_runtime(pool_bytes=1 << 20)  # which not all of the requests fit
    assert runtime.usage() == {}
    busy, idle = runtime.app("busy"), runtime.app("idle", priority="background")
    session = idle.session("kept")
    answer(session, random_ids(20), sampling(3))
    streams = [busy.session().submit_ids(random_ids(20, seed), sampling(3000)) for seed in range(9)]
    eventually(lambda: runtime.usage()["busy"].num_running.total() > 0)
    usage = runtime.usage()
    assert usage.keys() == {"busy", "idle"}
    ours, other = usage["busy"], usage["idle"]
    assert ours.num_waiting["interactive"] + ours.num_running["interactive"] == 9
    assert ours.num_waiting.total() > 0
    assert (ours.num_open, ours.num_stored) == (9, 0)
    assert (other.num_open, other.num_stored) == (1, 1)
    assert other.num_waiting.total() + other.num_running.total() == 0
    assert ours.kv_bytes > 0
    used_bytes = runtime.pool_snapshot().used_bytes
    assert ours.kv_bytes + other.kv_bytes <= runtime.pool_snapshot().budget_bytes
    assert used_bytes > 0
    for stream in streams:
        stream.close()
    busy.close()
    session.close()
    left = {"idle": AppUsage(num_stored=1)}
    eventually(lambda: {n: u for n, u in runtime.usage().items() if u != AppUsage()} == left)


def test_evaluations_are_no_apps(open_runtime):
    runtime = open_runtime()
    runtime.logits(random_ids(30))
    assert runtime.usage() == {}
