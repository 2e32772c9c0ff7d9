"""Rows and comparisons of `bench switch`, from made-up runs."""

import json
from dataclasses import fields, replace

import pytest

from edgekv.bench.sessions.drive import Asked, num_unanswered
from edgekv.bench.sessions.switch_rows import Run, draw_rows, make_rows, print_rows
from edgekv.bench.sessions.turns import Difference, Played, app_name, differences
from edgekv.engine.ledger import EngineCounters
from edgekv.engine.swap import SwapCounters
from edgekv.kv.layout import PoolSnapshot
from edgekv.metrics import Stats
from edgekv.runtime import Reply
from edgekv.store import StoreSnapshot

HEAD = {"model": "tiny", "trace": "random", "update_frequency": 0.04}
FACTS = {"sessions": 2, "tokens_mean": 30, "utilisation": None, "capacity_turns_per_s": 2.0}
ZERO = Stats(**{f.name: 0 for f in fields(Stats)} | {"prefill_mode": "exact"})
STORE = replace(
    StoreSnapshot(**{f.name: 0 for f in fields(StoreSnapshot)}),
    budget_bytes=1 << 30,
    peak_bytes=1 << 29,
    written_bytes=220 << 20,
    kv_written_bytes=200 << 20,
    read_bytes=80 << 20,
    num_write_calls=100,
    num_read_calls=50,
)


def reply(ttft_ms, token_ids, num_prompt):
    stats = replace(
        ZERO,
        ttft_ms=ttft_ms,
        num_prompt_tokens=num_prompt,
        num_output_tokens=len(token_ids),
        num_preemptions=1,
    )
    gaps = tuple((ttft_ms or 0.0) / 10 for _ in token_ids[1:])
    return Reply(text="", token_ids=token_ids, finish_reason="length", stats=stats, gaps_ms=gaps)


def asked(session, reply, *, num_computed=None, waited_ms=0.0, whole=True):
    num_prompt = reply.stats.num_prompt_tokens
    return Asked(
        who=app_name(session),
        prompt=[0] * num_prompt,
        reply=reply,
        num_computed=num_prompt if num_computed is None else num_computed,
        submitted_ms=0.0,
        waited_ms=waited_ms,
        whole=whole,
    )


def played(ttft_ms=100.0, last=9, errors=()):
    """Two sessions; the first has two turns."""
    turns = [
        asked(0, reply(ttft_ms, (1, 2, 3), 10)),
        asked(1, reply(2 * ttft_ms, (7, 8, last), 30)),
        asked(0, reply(ttft_ms, (4, 5), 20)),
    ]
    return Played(asked=turns, elapsed_ms=2000.0, errors=list(errors))


def run(
    policy,
    *,
    store=None,
    num_rows=70,
    peak_bytes=950,
    utilisation=None,
    busy_ms=0.0,
    **kwargs,
):
    return Run(
        policy=policy,
        facts=FACTS | {"utilisation": utilisation, "window_s": 2.0},
        busy_ms=busy_ms,
        played=played(**kwargs),
        token_bytes=4 << 20,
        pool=PoolSnapshot(budget_bytes=1000, used_bytes=0, free_bytes=0, peak_bytes=peak_bytes),
        engine=EngineCounters(
            num_steps=40,
            num_rows=num_rows,
            num_steps_thrown=3,
            tbt_target_ms=100.0,
            service_ms={},
            swap=SwapCounters(num_restored_tokens=12),
        ),
        store=store,
    )


def rows_of(*runs):
    return make_rows(HEAD, runs)


def test_a_row():
    (row,) = rows_of(run("reuse", store=STORE))
    assert row["policy"] == "reuse"
    assert row["ttft_ms_p50"] == 100.0
    assert row["ttft_ms_p95"] is row["ttft_ms_p99"] is None  # three samples
    assert row["tbt_ms_p50"] == 10.0
    assert (row["num_ttft"], row["num_tbt"], row["turns"]) == (3, 5, 3)
    assert row["throughput"] == pytest.approx(8 / 2.0)
    assert row["preemptions"] == 3
    assert row["tokens_restored"] == 12
    assert row["tokens_recomputed"] == 70 - (21 + 32)  # all tokens but each session's last
    assert row["mean_io_bytes"] == pytest.approx((300 << 20) / 150)
    assert row["mean_write_bytes"] == pytest.approx((220 << 20) / 100)
    assert row["bytes_written_per_new_kv_byte"] == pytest.approx(220 / (4 * (21 + 32)))
    assert row["pool_peak_ratio"] == pytest.approx(0.95)
    assert row["disk_peak_ratio"] == pytest.approx(0.5)
    assert row["ratio_vs_naive"] is row["ratio_vs_recompute"] is None
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_ratios_are_in_favour_of_the_row():
    rows = rows_of(run("recompute"), run("naive", store=STORE), run("reuse", ttft_ms=25.0))
    assert rows[2]["ratio_vs_naive"]["ttft_ms_p50"] == pytest.approx(4.0)
    assert rows[2]["ratio_vs_naive"]["ttft_ms_p95"] is None
    assert rows[2]["ratio_vs_recompute"]["tbt_ms_p50"] == pytest.approx(4.0)
    assert rows[1]["ratio_vs_naive"]["throughput"] == 1.0
    assert set(rows[0]["ratio_vs_naive"]) == {
        *(f"{what}_ms_{p}" for what in ("ttft", "tbt") for p in ("p50", "p95", "p99")),
        "throughput",
    }


def test_overheads_are_to_everything_in_memory():
    rows = rows_of(run("resident"), run("reuse", ttft_ms=150.0), run("naive", ttft_ms=300.0))
    assert rows[0]["overhead_vs_resident"] is None
    assert rows[1]["overhead_vs_resident"]["ttft_ms_p50"] == pytest.approx(1.5)
    assert rows[2]["overhead_vs_resident"]["tbt_ms_p50"] == pytest.approx(3.0)
    (alone,) = rows_of(run("reuse"))
    assert alone["overhead_vs_resident"] is None


def test_repetitions_are_pooled_and_ratios_are_of_pairs():
    naive = [run("naive", ttft_ms=ms) for ms in (100.0, 300.0, 900.0)]
    reuse = [run("reuse", ttft_ms=ms, busy_ms=500.0) for ms in (50.0,) * 3]
    rows = rows_of(*(r for pair in zip(naive, reuse, strict=True) for r in pair))
    assert [row["policy"] for row in rows] == ["naive", "reuse"]
    assert rows[1]["turns"] == 9
    assert rows[1]["utilisation_measured"] == pytest.approx(0.25)
    assert rows[1]["ratio_vs_naive"]["ttft_ms_p50"] == pytest.approx(6.0)
    assert rows[0]["preemptions"] == 9


def test_utilisations_have_rows_of_their_own(capsys):
    runs = [run(p, utilisation=u) for u in (0.3, 0.9) for p in ("resident", "reuse")]
    rows = rows_of(*runs)
    assert [row["utilisation"] for row in rows] == [0.3, 0.3, 0.9, 0.9]
    print_rows(rows)
    out = capsys.readouterr().out
    assert "0.3 of 2.00 turns/s" in out
    assert "0.9 of 2.00 turns/s" in out
    assert "to resident" in out


def test_several_utilisations_are_drawn_as_curves(tmp_path):
    for utilisations in ((0.3,), (0.3, 0.9)):
        target = tmp_path / f"{len(utilisations)}.png"
        draw_rows(rows_of(*(run("reuse", utilisation=u) for u in utilisations)), target)
        assert target.read_bytes()[:4] == b"\x89PNG"


def test_turns_that_time_cut_off_count_as_they_are():
    cut = played()
    answered = reply(70.0, (1, 2), 40)
    cut.asked += [
        asked(0, answered, waited_ms=500.0, whole=False),
        asked(1, reply(None, (), 50), num_computed=33, waited_ms=800.0, whole=False),
    ]
    assert [turn.ttft_ms for turn in cut.asked[-2:]] == [70.0, 800.0]
    assert num_unanswered(cut.asked) == 1
    assert cut.num_output_tokens == 8 + 2
    assert cut.num_once_tokens == 41 + 33
    assert cut.outputs_sha256() == played().outputs_sha256()


def test_without_a_store_nothing_moved():
    (row,) = rows_of(run("recompute"))
    assert row["bytes_written"] == row["num_reads"] == row["disk_peak_ratio"] == 0
    assert row["mean_io_bytes"] is row["bytes_written_per_new_kv_byte"] is None


def test_an_exceeded_budget_is_a_bug():
    with pytest.raises(AssertionError, match="pool"):
        rows_of(run("reuse", peak_bytes=1001))
    with pytest.raises(AssertionError, match="stores"):
        rows_of(run("reuse", store=replace(STORE, peak_bytes=(1 << 30) + 1)))


def test_the_hash_is_of_all_answers():
    assert played().outputs_sha256() == played(ttft_ms=1.0).outputs_sha256()
    assert played().outputs_sha256() != played(last=10).outputs_sha256()


def test_where_answers_part():
    assert differences(played(), played()) == []
    found = differences(played(), played(last=10))
    assert found == [Difference(prefix=(*[0] * 30, 7, 8), first=9, second=10)]
    ended_early = played()
    ended_early.asked.pop()
    assert differences(played(), ended_early) == []


def test_the_tables_are_printed_whole_into_a_pipe(capsys):
    print_rows(rows_of(run("recompute"), run("naive", store=STORE), run("reuse", store=STORE)))
    out = capsys.readouterr().out
    assert "2 sessions, 3 turns" in out
    assert "vs naive: TTFT" in out
    assert "vs recompute: TTFT" in out
    assert "per new KV" in out
    assert "1.04" in out
    assert "…" not in out


def test_each_session_has_an_app_of_its_own():
    assert len({app_name(i) for i in range(9)}) == 9
