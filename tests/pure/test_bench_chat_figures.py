"""What `bench quality --chat` makes of replies, from made-up ones."""

import json
from dataclasses import fields

import pytest

from edgekv.bench.prediction.chat_figures import (
    Answer,
    Pair,
    chat_rows,
    print_chat,
    wrong_answers,
)
from edgekv.config import Sampling
from edgekv.metrics import Stats

ZERO = {field.name: 0 for field in fields(Stats)} | {"sampling": Sampling()}


def answer(*, text="0123456789", whole_ms=1000.0, retracted=0, early=False, **stats):
    figures = {"num_prompt_tokens": 300, "ttft_ms": 100.0, "ttft_confirmed_ms": 100.0} | stats
    return Answer(
        text=text,
        token_ids=tuple(map(ord, text)),
        stats=Stats(**(ZERO | figures)),
        whole_ms=whole_ms,
        began_early=early,
        num_retracted_chars=retracted,
    )


def pair(*, kind="novel", context=256, agreed=(True,), is_tie=False, exact=None, **predicted):
    return Pair(
        kind=kind,
        context=context,
        exact=exact or answer(),
        predicted=answer(**predicted),
        agreed=agreed,
        certain=(0.5,) * len(agreed),
        is_tie=is_tie,
    )


HELD = pair(ttft_ms=110.0, ttft_confirmed_ms=110.0, whole_ms=1100.0, agreed=(False,))
AHEAD = pair(
    early=True,
    num_confirmed_tokens=4,
    ttft_ms=50.0,
    ttft_confirmed_ms=120.0,
    whole_ms=1040.0,
    agreed=(True, True, True, False),
)
CORRECTED = pair(
    early=True,
    num_confirmed_tokens=1,
    num_retracted_tokens=2,
    num_forced_tokens=0,
    num_rows_cut=0,
    kv_bytes=1 << 20,
    retracted=6,
    ttft_ms=40.0,
    ttft_confirmed_ms=125.0,
    whole_ms=1060.0,
    agreed=(True, False),
)


def test_shares_means_and_medians():
    (row,) = chat_rows([HELD, AHEAD, CORRECTED])
    assert (row["context"], row["kind"], row["num_prompts"]) == (None, None, 3)
    assert row["prompt_tokens"] == 300
    assert row["early_share"] == pytest.approx(2 / 3)
    assert row["tokens_ahead"] == pytest.approx(7 / 3)
    assert row["tokens_ahead_early"] == pytest.approx(7 / 2)
    assert (row["num_corrected"], row["corrected_share"]) == (1, pytest.approx(1 / 3))
    assert row["erasure"] == pytest.approx(6 / 30)
    assert row["agreement"] == pytest.approx((0 + 3 / 4 + 1 / 2) / 3)
    assert row["first_agreement"] == pytest.approx(2 / 3)
    assert (row["exact_ttft_ms"], row["ttft_ms"], row["ttft_confirmed_ms"]) == (100, 50, 120)
    assert row["ttft_ratio"] == pytest.approx(100 / 50)
    assert row["ttft_ratio_early"] == pytest.approx((100 / 50 + 100 / 40) / 2)
    assert row["ttft_confirmed_ratio"] == pytest.approx(100 / 120)
    assert (row["exact_whole_ms"], row["whole_ms"]) == (1000, 1060)
    assert row["whole_ratio"] == pytest.approx(1.06)
    assert row["num_differing"] == row["num_ties"] == 0
    assert [sample["agreed"] for sample in row["samples"]] == [
        p.agreed for p in (HELD, AHEAD, CORRECTED)
    ]
    json.dumps(row, allow_nan=False)


def test_ratios_are_of_pairs_not_of_medians():
    slow = answer(ttft_ms=1000.0, whole_ms=9000.0)
    pairs = [
        pair(exact=slow, ttft_ms=500.0, whole_ms=9000.0),
        pair(ttft_ms=100.0, whole_ms=1000.0),
        pair(ttft_ms=100.0, whole_ms=1500.0),
    ]
    (row,) = chat_rows(pairs)
    assert row["ttft_ratio"] == row["whole_ratio"] == 1.0
    assert row["exact_ttft_ms"] / row["ttft_ms"] == 1.0
    assert row["whole_ms"] / row["exact_whole_ms"] == 1.5


def test_nothing_begins_early():
    (row,) = chat_rows([HELD, HELD])
    assert row["early_share"] == row["tokens_ahead"] == row["erasure"] == 0
    assert row["tokens_ahead_early"] is row["ttft_ratio_early"] is None


def test_a_correction_that_takes_no_text_back_counts():
    (row,) = chat_rows([pair(early=True, num_retracted_tokens=1)])
    assert (row["num_corrected"], row["erasure"]) == (1, 0)


def test_answers_without_text():
    nothing = answer(text="", ttft_ms=None, queue_ms=30.0, prefill_ms=60.0)
    (row,) = chat_rows([pair(text="", ttft_ms=None, ttft_confirmed_ms=None, exact=nothing)])
    assert row["exact_ttft_ms"] == 90.0
    assert row["erasure"] is row["ttft_confirmed_ms"] is None


def test_rows_of_lengths_and_kinds_where_there_are_several():
    pairs = [pair(kind=k, context=c) for k, c in (("a", 9), ("b", 9), ("a", 5), ("b", 5))]
    rows = chat_rows([*pairs, pair(kind="a", context=5)])
    assert [(r["context"], r["kind"], r["num_prompts"]) for r in rows] == [
        (None, None, 5),
        (9, None, 2),
        (5, None, 3),
        (None, "a", 3),
        (None, "b", 2),
    ]
    assert ["samples" in row for row in rows] == [True, False, False, False, False]
    assert len(chat_rows(pairs[:2])) == 3
    assert len(chat_rows(pairs[:1])) == 1


def test_an_answer_that_is_not_exact_is_told_unless_it_is_a_tie():
    others = [pair(text="other"), pair(text="another", is_tie=True), pair()]
    rows = [row | {"predictor": "mine"} for row in chat_rows([*others, pair(context=5)])]
    assert (rows[0]["num_differing"], rows[0]["num_ties"]) == (2, 1)
    (said,) = wrong_answers(rows)
    assert said == "mine: 1 of 4 confirmed answers are not what exact KV says"
    assert wrong_answers([row | {"predictor": ""} for row in chat_rows(others[1:])]) == []


def test_ids_that_differ_behind_the_same_text():
    same = answer()
    other = Answer(**{f.name: getattr(same, f.name) for f in fields(Answer)} | {"token_ids": (1,)})
    found = Pair(kind="", context=1, exact=same, predicted=other, agreed=(True,), certain=(1.0,))
    assert found.differs


def test_the_tables(capsys):
    named = {"model": "tiny", "corrected_max": 0.03}
    rows = [
        row | named | {"predictor": name, "certain_min": certain}
        for name, certain in (("one", 0.625), ("two", None))
        for row in chat_rows([HELD, AHEAD, pair(kind="code", context=512)])
    ]
    print_chat(rows)
    out = capsys.readouterr().out
    one, two = out.split("tiny · two")
    assert "tiny · one · at most 3.0% corrected, from a certainty of 0.6 on" in one
    assert "not calibrated" in two
    for table in (one, two):
        assert "…" not in table
        heads = [line.split()[:1] for line in table.splitlines()]
        abouts = ["all", "256", "512", "novel", "code"]
        assert [head[0] for head in heads if head and head[0] in abouts] == 2 * abouts
