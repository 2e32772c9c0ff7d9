import pytest

from edgekv.cli.render import bar, duration, error_text, length_note, size, stats_line
from edgekv.config import Sampling, SamplingParams


def test_stats_line(stats):
    assert stats_line(stats()) == (
        "TTFT 412 ms (queue 0) · prefill exact · cached 14/18 · 41.2 tok/s · max gap 38 ms · "
        "greedy · 0.9 GB"
    )


def test_stats_line_of_a_predicted_prefill(stats):
    line = stats_line(
        stats(prefill_mode="predict", num_predicted_tokens=400, num_repaired_tokens=96)
    )
    assert "prefill predicted 400, repaired 96 ·" in line
    line = stats_line(
        stats(prefill_mode="predict", num_predicted_tokens=400, repair_agreement=0.955)
    )
    assert "repaired 0 (96% as exact) ·" in line
    assert " · prefill predicted 400 · " in stats_line(
        stats(prefill_mode="predict", num_predicted_tokens=400)
    )


def test_stats_line_of_an_answer_that_began_early(stats):
    early = {"prefill_mode": "predict", "num_predicted_tokens": 400, "ttft_confirmed_ms": 900.0}
    line = stats_line(stats(**early, num_confirmed_tokens=3))
    assert line.startswith("TTFT 412 ms (queue 0, certain 900) · prefill predicted 400, 3 tokens")
    assert "3 tokens early · cached" in line
    line = stats_line(stats(**early, num_confirmed_tokens=1, num_retracted_tokens=2))
    assert "3 tokens early, 2 taken back · cached" in line


def test_stats_line_without_tokens(stats):
    line = stats_line(stats(ttft_ms=None, ttft_confirmed_ms=None, num_output_tokens=0))
    assert line == "TTFT – (queue 0) · prefill exact · cached 14/18 · greedy · 0.9 GB"


def test_stats_line_of_a_session_that_was_away(stats):
    line = stats_line(stats(num_restored_tokens=2048, restore_ms=41.6, num_preemptions=2))
    assert "cached 14/18 · restored 2048 (42 ms) · preempted 2× · 41.2" in line


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        (Sampling(top_k=20), "greedy"),
        (Sampling(repetition_penalty=1.1), "greedy, repetition penalty 1.1"),
        (Sampling(presence_penalty=0.5), "greedy, presence penalty 0.5"),
        (Sampling(frequency_penalty=-1.0), "greedy, frequency penalty -1"),
        (Sampling(temperature=0.6, top_p=0.95, top_k=20), "temperature 0.6, top-k 20, top-p 0.95"),
        (Sampling(temperature=1.0, min_p=0.05), "temperature 1, min-p 0.05"),
    ],
)
def test_stats_line_says_how_tokens_were_chosen(stats, sampling, text):
    assert f" · {text} · " in stats_line(stats(sampling=sampling))


def test_error_text():
    assert error_text("it broke", "mend it") == "error: it broke\n\nhint: mend it"
    assert error_text("it broke", "") == "error: it broke"
    assert error_text("no file '\x1b[2Ja\nb'", "") == "error: no file 'a b'"


def test_length_note_names_the_limit(stats):
    assert "5 tokens" in length_note(stats(), SamplingParams(max_tokens=5))
    assert "context" in length_note(stats(), SamplingParams(max_tokens=6))
    assert "context" in length_note(stats(), SamplingParams())


@pytest.mark.parametrize(
    ("done", "total", "drawn"), [(0, 10, "░░░░"), (5, 10, "██░░"), (10, 10, "████"), (0, 0, "░░░░")]
)
def test_bar(done, total, drawn):
    assert bar(done, total, 4) == drawn


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59, "59 s"), (59.5, "1 min 0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 kB"), (98_362_432, "98.4 MB"), (5_100_000_000, "5.1 GB")]
)
def test_size(num_bytes, text):
    assert size(num_bytes) == text
