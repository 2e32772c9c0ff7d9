"""`bench serve` against a server that does what a script says, over real sockets."""

import asyncio
import itertools
import time

import pytest
from mock_openai import Behaviour, serving

from edgekv.bench.serving import client as serve_client
from edgekv.bench.serving.client import Client, Endpoint, TargetFailed, parse_target
from edgekv.bench.serving.play import PAST, Player
from edgekv.bench.serving.schedule import Scripted, TextScale
from edgekv.bench.serving.traffic import AppTraffic
from edgekv.bench.sessions.conversations import Talk, Turn
from edgekv.errors import ConfigError

pytestmark = pytest.mark.slow

APP = AppTraffic(name="app", key="its-key", priority="background")
OTHER = AppTraffic(name="other")
SLOW_S = 0.3  # much longer than a request takes on a busy machine


def ask(mock, *, timeout_s=30.0, keys=None, app="app"):
    async def once():
        endpoint = Endpoint(name="mock", url=f"{mock.url}/v1", keys=keys or {})
        async with Client(endpoint, [APP, OTHER]) as client:
            return await client.ask(app, [{"role": "user", "content": "x" * 40}], 3, timeout_s)

    return asyncio.run(once())


def play(mock, script, *, window_s=30.0, drain_s=30.0):
    async def once():
        endpoint = Endpoint(name="mock", url=f"{mock.url}/v1")
        async with Client(endpoint, [APP, OTHER]) as client:
            player = Player(client, TextScale())
            return await player.play_open(script, window_s=window_s, drain_s=drain_s)

    return asyncio.run(once())


def scripted(name, start_ms, *pauses_ms, past=0):
    turns = [Turn(think_ms=ms, input_tokens=10, output_tokens=3) for ms in (0.0, *pauses_ms)]
    talk = Talk(start_ms=start_ms, turns=tuple(turns), num_past_tokens=past)
    return Scripted(app="app", name=name, talk=talk)


def test_a_whole_answer_and_when_its_parts_came():
    waits = Behaviour(headers_s=0.1, first_s=0.2, gap_s=0.05, num_texts=4)
    with serving(lambda body: waits) as mock:
        answer = ask(mock)
    assert answer.fault is None
    assert answer.text == "word0 word1 word2 word3 "
    assert answer.headers_ms >= 100.0
    assert answer.opening_ms >= answer.headers_ms
    assert answer.ttft_ms >= answer.opening_ms + 190.0
    assert len(answer.gaps_ms) == 3
    assert sum(answer.gaps_ms) >= 140.0
    assert answer.total_ms >= answer.ttft_ms + sum(answer.gaps_ms)
    assert (answer.num_prompt_tokens, answer.num_cached_tokens) == (20, 5)
    assert answer.num_output_tokens == 4


def test_what_a_server_is_sent():
    with serving(models=["the-one"]) as mock:
        ask(mock)
        ask(mock, keys={"app": "a-new-key"})
        ask(mock, app="other")
    first, second, third = mock.seen
    assert first.body == {
        "model": "the-one",
        "messages": [{"role": "user", "content": "x" * 40}],
        "max_tokens": 3,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [seen.key for seen in mock.seen] == ["its-key", "a-new-key", None]
    assert first.headers["x-edgekv-priority"] == "background"
    assert third.headers["x-edgekv-priority"] == "interactive"
    assert second.body == first.body


@pytest.mark.parametrize(
    ("behaviour", "fault"),
    [
        (Behaviour(status=500), "HTTP 500"),
        (Behaviour(status=429), "HTTP 429"),
        (Behaviour(ending="cut"), "RemoteProtocolError"),
        (Behaviour(ending="no finish"), "no finish_reason"),
        (Behaviour(ending="no done"), "no [DONE]"),
        (Behaviour(ending="error event"), "error event: overloaded"),
        (Behaviour(ending="malformed"), "malformed event"),
        (Behaviour(num_texts=0), "empty answer"),
    ],
)
def test_answers_that_are_not_whole_are_told_apart(behaviour, fault):
    with serving(lambda body: behaviour) as mock:
        answer = ask(mock)
    assert answer.fault == fault
    assert answer.headers_ms is not None


def test_a_server_that_falls_silent_is_left():
    with serving(lambda body: Behaviour(ending="never")) as mock:
        answer = ask(mock, timeout_s=SLOW_S)
        assert answer.timed_out
        assert answer.text == "word0 word1 word2 "
        assert answer.total_ms == pytest.approx(1e3 * SLOW_S, abs=250.0)


def test_nobody_listens():
    with serving() as mock:
        pass
    with pytest.raises(TargetFailed, match="ConnectError"):
        ask(mock)

    async def named():
        endpoint = Endpoint(name="mock", url=f"{mock.url}/v1", model="some")
        async with Client(endpoint, [APP]) as client:
            return await client.ask("app", [], 1, 30.0)

    assert asyncio.run(named()).fault == "ConnectError"


def test_of_several_models_one_must_be_named():
    with serving(models=["a", "b"]) as mock, pytest.raises(ConfigError, match="2 models") as caught:
        ask(mock)
    assert "#MODEL" in caught.value.hint


def test_a_server_that_lists_no_models(monkeypatch):
    monkeypatch.setattr(serve_client, "_MODELS_TIMEOUT_S", 5.0)
    with serving() as mock:
        mock.url += "/elsewhere"
        with pytest.raises(TargetFailed, match="404"):
            ask(mock)


@pytest.mark.parametrize(
    ("text", "name", "url", "model"),
    [
        ("http://127.0.0.1:80", "127.0.0.1:80", "http://127.0.0.1:80/v1", ""),
        ("a=http://h:1/v1/", "a", "http://h:1/v1", ""),
        ("a=https://h/api#org/m", "a", "https://h/api/v1", "org/m"),
        ("http://h:1/?x=y", None, None, None),
        ("h:1", None, None, None),
        ("a=", None, None, None),
        ("a=ftp://h", None, None, None),
    ],
)
def test_targets_as_they_are_written(text, name, url, model):
    if name is None:
        with pytest.raises(ConfigError, match="target is"):
            parse_target(text)
    else:
        assert parse_target(text) == Endpoint(name=name, url=url, model=model)


# --- open loop ---


def test_nobody_waits_for_the_answers_of_others():
    """Eight at 20 ms from each other, on a server that takes 300 ms each: all are sent in time."""
    script = [scripted(f"talk {n}", 20.0 * n) for n in range(8)]
    with serving(lambda body: Behaviour(headers_s=SLOW_S)) as mock:
        served = play(mock, script)
    assert len(served) == len(mock.seen) == 8
    assert all(each.sent_ms >= each.due_ms for each in served)
    # Closed-loop, the last would have been sent after seven answers.
    assert max(each.sent_ms for each in served) < 3 * 1e3 * SLOW_S
    ends = [each.sent_ms + each.answer.total_ms for each in served]
    assert max(each.sent_ms for each in served[1:]) < max(ends)
    assert served[4].sent_ms < served[0].sent_ms + served[0].answer.total_ms


def test_turns_have_what_was_said_before_and_come_at_their_times():
    with serving() as mock:
        first, second, third = play(mock, [scripted("talk", 50.0, 100.0, 200.0)])
    assert [each.turn for each in (first, second, third)] == [0, 1, 2]
    assert [each.due_ms for each in (first, second, third)] == [50.0, 150.0, 350.0]
    assert all(each.late_ms < 150.0 for each in (first, second, third))
    texts = [seen.texts for seen in mock.seen]
    assert [len(each) for each in texts] == [1, 3, 5]
    assert texts[2][:3] == texts[1]
    assert texts[1][:2] == [texts[0][0], "word0 word1 word2 "]
    roles = [message["role"] for message in mock.seen[2].body["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]


def test_a_turn_waits_for_the_answer_before_it_alone():
    with serving(lambda body: Behaviour(headers_s=SLOW_S)) as mock:
        first, second = play(mock, [scripted("talk", 0.0, 10.0)])
    assert second.due_ms == 10.0
    assert second.sent_ms >= first.sent_ms + first.answer.total_ms
    assert second.late_ms >= 250.0


def test_what_was_said_before_the_play_is_not_on_its_clock():
    with serving(lambda body: Behaviour(headers_s=SLOW_S)) as mock:
        past, turn = play(mock, [scripted("talk", 0.0, past=30)])
    assert (past.turn, turn.turn) == (PAST, 0)
    assert turn.sent_ms < 1e3 * SLOW_S
    assert mock.seen[1].texts[0] == mock.seen[0].texts[0]
    assert len(mock.seen[1].texts) == 3


def test_after_a_fault_a_conversation_is_over():
    with serving(lambda body: Behaviour(status=503)) as mock:
        served = play(mock, [scripted("a", 0.0, 1.0), scripted("b", 0.0, past=9)])
    assert [(each.name, each.turn) for each in served] == [("b", PAST), ("a", 0)]
    assert {each.answer.fault for each in served} == {"HTTP 503"}


def test_the_window_ends_sending_and_the_drain_ends_waiting():
    with serving(lambda body: Behaviour(ending="never")) as mock:
        started_s = time.monotonic()
        served = play(mock, [scripted("a", 0.0), scripted("b", 400.0)], window_s=0.3, drain_s=0.2)
        assert time.monotonic() - started_s < 5.0
    (only,) = served
    assert only.name == "a"
    assert only.answer.timed_out


def test_busy_users_never_pause():
    talks = (scripted(f"mix {n}", 1e6, 1e6) for n in itertools.count())
    with serving(lambda body: Behaviour(headers_s=0.02)) as mock:

        async def once():
            endpoint = Endpoint(name="mock", url=f"{mock.url}/v1")
            async with Client(endpoint, [APP]) as client:
                player = Player(client, TextScale())
                return await player.play_closed(talks, num_users=3, for_s=0.4)

        served, elapsed_s = asyncio.run(once())
    assert elapsed_s >= 0.4
    assert len(served) >= 6
    assert {each.turn for each in served} == {0, 1}
    spans = [(s.sent_ms, s.sent_ms + s.answer.total_ms) for s in served]
    at_once = max(sum(a <= moment < b for a, b in spans) for moment, _ in spans)
    assert at_once <= 3
