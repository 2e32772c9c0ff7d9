"""The raw gaps behind a reply's figures."""

from tiny_models import random_ids
from tiny_runtime import answer, sampling


def test_a_reply_tells_every_gap_between_its_tokens(app):
    reply = answer(app.session(), random_ids(20), sampling(6))
    assert len(reply.gaps_ms) == 5
    assert max(reply.gaps_ms) == reply.stats.tbt_max_ms
    assert all(gap > 0 for gap in reply.gaps_ms)
    assert "gaps_ms" not in repr(reply)


def test_one_token_has_no_gap(app):
    assert answer(app.session(), random_ids(20), sampling(1)).gaps_ms == ()
