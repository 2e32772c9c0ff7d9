"""What an event stream says, and what becomes of many answers: rows, percentiles, ratios."""

import json

import pytest

from edgekv.bench.report import fill
from edgekv.bench.serving import rows as serve_rows
from edgekv.bench.serving.play import PAST, Served
from edgekv.bench.serving.rows import compare, draw_rows, make_rows, print_rows
from edgekv.bench.serving.schedule import Scripted
from edgekv.bench.serving.stream import TIMED_OUT, Answer, StreamReader
from edgekv.bench.serving.traffic import AppTraffic, Scenario
from edgekv.bench.sessions.conversations import Talk, Turn

# --- one stream ---


def event(**fields):
    return f"data: {json.dumps(fields)}"


def says(text, **choice):
    return event(choices=[{"delta": {"content": text}, **choice}])


WHOLE = [
    ": keepalive 1/2",
    "",
    event(choices=[{"delta": {"role": "assistant", "content": ""}}]),
    says("Hel"),
    says("lo"),
    says(None),
    says("!"),
    event(choices=[{"delta": {}, "finish_reason": "length"}]),
    event(
        choices=[],
        usage={
            "prompt_tokens": 40,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 30},
        },
    ),
    "data: [DONE]",
]


def read(lines, **outside):
    """The answer of a stream whose line n comes at 10 n ms."""
    reader = StreamReader()
    for number, line in enumerate(lines):
        reader.take(line, 10.0 * number)
    return reader.answer(500.0, **outside)


def test_a_whole_stream():
    assert read(WHOLE, headers_ms=1.0) == Answer(
        total_ms=500.0,
        text="Hello!",
        headers_ms=1.0,
        opening_ms=20.0,  # no comment is an event
        ttft_ms=30.0,  # no empty text is a token
        gaps_ms=(10.0, 20.0),
        num_prompt_tokens=40,
        num_cached_tokens=30,
        num_output_tokens=4,
    )


def test_reasoning_is_output_too():
    thinks = event(choices=[{"delta": {"reasoning_content": "hm"}}])
    answer = read([thinks, *WHOLE])
    assert (answer.ttft_ms, answer.text) == (0.0, "hmHello!")


def test_a_server_that_counts_nothing():
    answer = read([line for line in WHOLE if "usage" not in line])
    assert (answer.num_prompt_tokens, answer.num_cached_tokens) == (None, None)
    assert answer.num_output_tokens == 3  # events that hold text
    assert answer.fault is None


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([], "no finish_reason"),
        (WHOLE[:5], "no finish_reason"),
        ([*WHOLE[:7], WHOLE[-1]], "no finish_reason"),
        (WHOLE[:-1], "no [DONE]"),
        ([WHOLE[2], *WHOLE[7:]], "empty answer"),
        ([*WHOLE[:4], "data: {oops", *WHOLE[4:]], "malformed event"),
        ([*WHOLE[:4], "data: 3", *WHOLE[4:]], "malformed event"),
        ([*WHOLE[:4], event(error={"type": "overloaded"})], "error event: overloaded"),
        ([*WHOLE[:4], event(error="no")], "error event: of no type"),
    ],
)
def test_what_makes_an_answer_not_whole(lines, fault):
    assert read(lines).fault == fault


@pytest.mark.parametrize(
    "odd",
    [
        event(choices=[3]),
        event(choices=3),
        event(choices=[{"delta": "x"}]),
        event(choices=[{"delta": {"content": 3}}]),
        event(usage={"prompt_tokens": "many", "prompt_tokens_details": 3}),
    ],
)
def test_events_of_a_strange_shape_are_no_error_of_ours(odd):
    assert read([odd, *WHOLE[:-2], WHOLE[-1]]).fault == "malformed event"


def test_what_went_wrong_outside_counts_first():
    assert read(WHOLE[:5], fault="ReadError").fault == "ReadError"
    assert read([], fault=TIMED_OUT).timed_out


# --- rows ---

SHORT = AppTraffic(name="short")
USUAL = AppTraffic(name="interactive", prompt_tokens=(60, 60))
LONG = AppTraffic(name="long", priority="background", prompt_tokens=(500, 500))
TWO = Scenario(name="two", apps=(SHORT, LONG))
ALONE = {"short": 10.0, "long": 100.0}


def scripted(app, start_ms, *pauses):
    turns = [Turn(think_ms=ms, input_tokens=5, output_tokens=2) for ms in (0.0, *pauses)]
    return Scripted(
        app=app, name=f"{app} {start_ms}", talk=Talk(start_ms=start_ms, turns=(*turns,))
    )


def served(app, ttft_ms, *, turn=0, due_ms=0.0, sent_ms=0.0, fault=None, **answer):
    fields = {
        "total_ms": 1000.0 if ttft_ms is None else ttft_ms + 20.0,
        "headers_ms": 1.0,
        "opening_ms": 2.0,
        "ttft_ms": ttft_ms,
        "gaps_ms": () if ttft_ms is None else (8.0, 12.0),
        "num_prompt_tokens": 50,
        "num_cached_tokens": 10,
        "num_output_tokens": 0 if ttft_ms is None else 3,
        "fault": fault,
    }
    return Served(
        app=app,
        name="",
        turn=turn,
        due_ms=due_ms,
        sent_ms=sent_ms,
        answer=Answer(**(fields | answer)),
    )


def rows_of(sent, script=(), target="ours", scenario=TWO):
    return make_rows(scenario, target, script, sent, window_s=10.0, alone_ms=ALONE)


def test_a_row_for_each_app():
    shorts = [served("short", float(ms)) for ms in range(1, 101)]
    script = [scripted("short", 0.0)] * 100 + [scripted("long", 0.0)]
    short, long = rows_of([*shorts, served("long", 400.0)], script)
    assert (short["app"], long["app"], long["class"]) == ("short", "long", "background")
    assert (short["requests"], short["answered"], short["failed"]) == (100, 100, 0)
    assert short["ttft_ms_p50"] == pytest.approx(50.5)
    assert short["ttft_ms_p95"] == pytest.approx(95.05)
    assert short["ttft_ms_p99"] == pytest.approx(99.01)
    assert (short["headers_ms_p99"], short["opening_ms_p99"]) == (1.0, 2.0)
    assert short["gap_ms_p50"] == pytest.approx(10.0)
    assert short["good"] == 50  # within five times the 10 ms alone
    assert short["goodput_per_s"] == 5.0
    assert (short["prompt_tokens"], short["cached_share"]) == (5000, 0.2)
    assert (short["tokens_per_s"], long["tokens_per_s"]) == (30.0, 0.3)
    assert short["tokens_per_s_all"] == long["tokens_per_s_all"] == pytest.approx(30.3)
    assert long["ttft_ms_p50"] == 400.0
    assert long["ttft_ms_p95"] is None  # of one request there is none
    assert (short["unsent"], short["jain"]) == (0, None)


def test_a_request_that_starved_counts_with_the_time_it_waited():
    starved = served("short", None, fault=TIMED_OUT)
    cut = served("short", 30.0, fault=TIMED_OUT)
    short, _ = rows_of([served("short", 10.0), cut, starved])
    assert (short["requests"], short["answered"], short["unanswered"]) == (3, 1, 2)
    assert short["failed"] == 0
    assert short["samples"]["ttft_ms"] == [10.0, 30.0, 1000.0]
    assert (short["good"], short["output_tokens"]) == (1, 6)


def test_failures_are_counted_by_kind_and_have_no_latency():
    sent = [served("short", 10.0), served("short", None, fault="HTTP 500")]
    sent += [served("short", 2.0, fault="no [DONE]"), served("short", None, fault="HTTP 500")]
    short, _ = rows_of(sent)
    assert (short["answered"], short["failed"]) == (1, 3)
    assert short["faults"] == {"HTTP 500": 2, "no [DONE]": 1}
    assert short["errors"] == ["ours: HTTP 500, 2 times", "ours: no [DONE], 1 times"]
    assert short["samples"]["ttft_ms"] == [10.0]


def test_what_was_said_before_the_play_only_counts_if_it_failed():
    past = served("short", 900.0, turn=PAST, fault="HTTP 503")
    short, _ = rows_of([past, served("short", 900.0, turn=PAST), served("short", 10.0)])
    assert (short["requests"], short["answered"], short["failed"]) == (1, 1, 1)
    assert (short["samples"]["ttft_ms"], short["prompt_tokens"]) == ([10.0], 50)


def test_turns_that_came_late_or_never():
    # Due at 1, 4 and 9 s; the fourth is behind the window.
    script = [scripted("short", 1000.0, 3000.0, 5000.0, 2000.0)]
    first = served("short", 10.0, due_ms=1000.0, sent_ms=1000.0)
    late = served("short", 10.0, turn=1, due_ms=4000.0, sent_ms=9500.0)
    short, long = rows_of([first, late], script)
    assert short["samples"]["late_ms"] == [0.0, 5500.0]
    assert (short["unsent"], long["unsent"], long["requests"]) == (1, 0, 0)


def test_speeds_are_by_the_time_until_the_last_answer():
    sent = [served("short", 10.0), served("long", 4980.0, sent_ms=10_000.0)]
    short, long = rows_of(sent)
    assert short["elapsed_s"] == long["elapsed_s"] == 15.0
    assert short["tokens_per_s"] == 0.2


def test_jains_index_is_of_apps_that_want_the_same():
    equal = [AppTraffic(name=name, key=name) for name in ("a", "b")]
    scenario = Scenario(name="equal", apps=(*equal, LONG))
    sent = [served("a", 10.0), served("a", 10.0), served("a", 10.0), served("b", 10.0)]
    a, b, long = rows_of(sent, scenario=scenario)
    assert a["jain"] == b["jain"] == pytest.approx((3 + 1) ** 2 / (2 * (9 + 1)))
    assert long["jain"] is None


def test_targets_are_compared_app_by_app():
    ours = rows_of([served("short", 10.0), served("long", 50.0)], target="ours")
    theirs = rows_of(
        [served("short", 40.0, num_output_tokens=1), served("long", 25.0)], target="theirs"
    )
    all_rows = [*ours, *theirs]
    compare(all_rows)
    assert [row["ratio"] for row in ours] == [None, None]
    short, long = (row["ratio"] for row in theirs)
    assert (short["ttft_ms_p50"], long["ttft_ms_p50"]) == (4.0, 0.5)
    assert short["tokens_per_s"] == pytest.approx(3.0)
    assert short["tokens_per_s_all"] == pytest.approx(1.5)
    assert short["ttft_ms_p95"] is None


def finished_rows():
    found, scenario = [], Scenario(name="two", apps=(USUAL, LONG))
    for name, factor in (("ours", 1.0), ("mlx-lm", 4.0)):
        times = [factor * ms for ms in range(100, 139)]
        sent = [served("interactive", ms) for ms in times] + [served("long", 99.0)]
        found += rows_of(sent, target=name, scenario=scenario)
    compare(found)
    head = {"rate_per_s": 2.5, "capacity_per_s": 5.0, "utilisation": 0.5, "model": "tiny"}
    return [{**head, **row} for row in found]


def test_the_tables(capsys):
    print_rows(finished_rows())
    out = capsys.readouterr().out
    assert "two · 2.50 requests/s for 10 s, 0.5 of what ours can do" in out
    (ratios,) = [line for line in out.splitlines() if "mlx-lm" in line and "4.00" in line]
    assert "4.00/4.00" in ratios
    assert len([line for line in out.splitlines() if "39/39" in line]) == 2
    assert max(map(len, out.splitlines())) <= 120
    assert "…" not in out, "nothing is cut"
    assert "interactive" in out


def test_every_column_can_be_filled():
    for row in finished_rows()[2:]:
        for _, template in (*serve_rows._TABLE, *serve_rows._RATIO_TABLE):
            fill(template, row)


def test_rows_are_json():
    json.dumps(finished_rows(), allow_nan=False)


@pytest.mark.slow
def test_the_picture(tmp_path):
    draw_rows(finished_rows(), tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")
