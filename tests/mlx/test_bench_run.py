"""Both benchmarks on a tiny model: both sides generate the same tokens, and all are counted."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from tiny_models import random_ids, tiny_config, write_folder
from tiny_runtime import answer, sampling

from edgekv.bench.report import machine, write_report
from edgekv.bench.speed import ours
from edgekv.bench.speed.ours import EdgeKVSide, open_runtime
from edgekv.bench.speed.peer_mlx_lm import MlxLmSide
from edgekv.bench.speed.scenarios import decode_workloads, run_scenario
from edgekv.bench.workload import Workload
from edgekv.config import RuntimeConfig
from edgekv.errors import ConfigError, UnsupportedModel
from edgekv.models.open_model import open_checkpoint
from edgekv.runtime import Runtime

pytestmark = pytest.mark.slow

NUM_SESSIONS = 10  # more than the peer prefills at a time


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), tiny_config("llama"))


@pytest.fixture
def runtime(folder):
    with Runtime.open(str(folder), config=RuntimeConfig(pool_bytes=1 << 26)) as runtime:
        yield runtime


def ttft_workloads(*lengths):
    return [Workload(lengths=(length,), new_tokens=16, reps=1) for length in lengths]


def prompts_of(lengths):
    return [random_ids(length, seed=i) for i, length in enumerate(lengths)]


def test_our_side_generates_what_each_session_generates_alone(runtime):
    prompts = prompts_of([5, 40, 17])
    sample = EdgeKVSide(runtime).run(prompts, 6)
    for i, prompt in enumerate(prompts):
        alone = answer(runtime.app(f"alone {i}").session(), prompt, sampling(12))
        assert sample.tokens[i] == alone.token_ids
    assert sample.num_prompt_tokens == 62
    assert len(sample.ttft_ms) == len(sample.warm_ttft_ms) == 3
    assert {len(times) for times in (*sample.cold_ms, *sample.decode_ms)} == {6}
    assert all(value > 0 for value in sample.figures().values())


def test_our_side_is_cold_every_time_and_leaves_nothing(runtime):
    side = EdgeKVSide(runtime)
    for _ in range(2):  # `run` asserts that nothing was cached
        side.run(prompts_of([20, 20]), 3)
    assert runtime.pool_snapshot().used_bytes == 0
    runtime.check_integrity()


def test_memory_of_the_other_side_is_not_counted(runtime):
    prompts = prompts_of([20])
    others_bytes = 64 << 20
    array = mx.zeros((others_bytes,), dtype=mx.uint8)
    mx.eval(array)
    all_bytes = EdgeKVSide(runtime).run(prompts, 3).peak_memory_bytes
    our_bytes = EdgeKVSide(runtime, foreign_bytes=others_bytes).run(prompts, 3).peak_memory_bytes
    assert all_bytes > others_bytes
    assert 0 < our_bytes < all_bytes - others_bytes // 2


@pytest.mark.parametrize("num_sessions", [1, 2, NUM_SESSIONS])
def test_the_peer_generates_the_same_tokens(runtime, num_sessions):
    prompts = prompts_of([4 + 7 * i for i in range(num_sessions)])
    mine = EdgeKVSide(runtime).run(prompts, 8)
    other = MlxLmSide(open_checkpoint(runtime.path, runtime.device)).run(prompts, 8)
    assert other.tokens == mine.tokens
    assert other.num_prompt_tokens == mine.num_prompt_tokens
    assert {len(times) for times in (*other.cold_ms, *other.decode_ms)} == {8}
    # All sessions in step, from the decode phase's first token to its last.
    assert len({(times[0], times[-1]) for times in other.decode_ms}) == 1
    assert all(a[-1] <= b[0] for a, b in zip(other.cold_ms, other.decode_ms, strict=True))
    assert other.peak_memory_bytes > 0


def test_ttft_rows(folder, tmp_path):
    seen = []
    rows = run_scenario(
        "ttft",
        str(folder),
        ttft_workloads(16, 40),
        peer="mlx-lm",
        watch=lambda *progress: seen.append(progress),
    )
    assert [row["prompt_tokens"] for row in rows] == [16, 40]
    for row in rows:
        assert row["scenario"] == "ttft"
        assert row["peer"].startswith("mlx-lm 0.")
        assert row["token_agreement"] == 1.0
        assert row["ratio"] > 0
        assert len(row["samples"]) == row["reps"] == 1
        assert row["failed"] == 0
        assert row["prefill_tokens_per_s"] > 0
    assert seen[:2] == [("ttft 1/2", 0, 4), ("ttft 1/2", 1, 4)]
    assert seen[-1] == ("ttft 2/2", 4, 4)
    write_report(machine(), rows, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == rows


def test_decode_rows(folder):
    workloads = decode_workloads(
        sessions=[1, 3], ragged=(8, 64), lengths=None, prompt_tokens=1, new_tokens=6, reps=1
    )
    rows = run_scenario("decode", str(folder), workloads, peer="mlx-lm")
    assert [row["sessions"] for row in rows] == [1, 3]
    for row in rows:
        assert len(row["lengths"]) == row["sessions"]
        assert row["token_agreement"] == 1.0
        assert row["ttft_ms_min"] <= row["ttft_ms_p50"] <= row["ttft_ms_max"]
        assert min(row["ratio"], row["ttft_ratio_min"], row["ttft_ratio_p50"]) > 0


def test_rows_without_a_peer(folder):
    (row,) = run_scenario("ttft", str(folder), ttft_workloads(16))
    assert row["peer"] is row["ratio"] is None
    assert row["decode_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("peer", "num_sessions", "match"), [("vllm", 1, "vllm"), ("mlx-lm", 33, "at most 32")]
)
def test_peers_that_cannot_be(peer, num_sessions, match):
    workload = Workload(lengths=(8,) * num_sessions, new_tokens=4, reps=1)
    with pytest.raises(ConfigError, match=match):
        run_scenario("decode", "never opened", [workload], peer=peer)


def test_the_pool_holds_all_sessions_without_a_wait(folder, monkeypatch):
    device = replace(ours.profile(), pool_bytes=1 << 18)
    monkeypatch.setattr(ours, "profile", lambda: device)
    workload = Workload(lengths=(300,) * 6, new_tokens=8, reps=1)
    with open_runtime(str(folder), [workload]) as runtime:
        assert runtime.pool_snapshot().budget_bytes > 1 << 18
        sample = EdgeKVSide(runtime).run(workload.prompts(runtime.tokenizer), 8)
    assert len(sample.ttft_ms) == 6


def test_workloads_that_the_model_or_the_machine_cannot_hold(folder, monkeypatch):
    with pytest.raises(ConfigError, match="context of 1024"):
        open_runtime(str(folder), [Workload(lengths=(2000,), new_tokens=4, reps=1)])
    device = replace(ours.profile(), memory_bytes=1 << 20)
    monkeypatch.setattr(ours, "profile", lambda: device)
    with pytest.raises(ConfigError, match=r"the device has 0\.0 GiB"):
        open_runtime(str(folder), [Workload(lengths=(900,) * 9, new_tokens=4, reps=1)])


def test_a_model_that_only_we_can_run(folder, monkeypatch):
    def refuse(_checkpoint):
        raise UnsupportedModel("mlx-lm cannot run this")

    monkeypatch.setattr("edgekv.bench.speed.peer_mlx_lm.build_model", refuse)
    with pytest.raises(UnsupportedModel):
        run_scenario("ttft", str(folder), ttft_workloads(8), peer="mlx-lm")
    mx.eval(mx.zeros(1))  # the runtime is closed, and the process goes on
