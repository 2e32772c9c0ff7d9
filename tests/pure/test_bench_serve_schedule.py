"""What `bench serve` sends, and when."""

import itertools
from dataclasses import replace
from statistics import mean

import pytest

from edgekv.bench.serving.schedule import TextScale, draw_mix, draw_script, text_of
from edgekv.bench.serving.traffic import AppTraffic, Scenario, usual_scenarios
from edgekv.errors import ConfigError

FEW = AppTraffic(name="few", share=1.0, prompt_tokens=(100, 200), output_tokens=(5, 9))
MANY = AppTraffic(name="many", share=3.0, prompt_tokens=(10, 20), output_tokens=(1, 1))
CHAT = AppTraffic(name="chat", kind="conversations", users=10, session_tokens=400)
TWO = Scenario(name="two", apps=(FEW, MANY))
TALKS = Scenario(name="talks", apps=(CHAT,))


def turns_due(script, window_s):
    return [ms for each in script for ms in each.due_ms() if ms < 1e3 * window_s]


def test_requests_are_poisson_and_shared_as_asked():
    script = draw_script(TWO, rate=40.0, window_s=200.0, seed=1)
    starts = [each.talk.start_ms for each in script]
    assert starts == sorted(starts)
    assert starts[0] > 0
    assert starts[-1] < 200_000.0
    assert len(script) == pytest.approx(8000, rel=0.05)
    of_few = [each for each in script if each.app == "few"]
    assert len(of_few) == pytest.approx(2000, rel=0.1)
    # Memoryless: gaps vary as much as they are long on average.
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert mean(gap**2 for gap in gaps) == pytest.approx(2 * mean(gaps) ** 2, rel=0.1)


def test_lengths_are_what_the_app_says():
    for each in draw_script(TWO, rate=20.0, window_s=20.0, seed=2):
        (turn,) = each.talk.turns
        app = FEW if each.app == "few" else MANY
        assert app.prompt_tokens[0] <= turn.input_tokens <= app.prompt_tokens[1]
        assert app.output_tokens[0] <= turn.output_tokens <= app.output_tokens[1]


def test_the_same_seed_draws_the_same_and_another_does_not():
    for scenario in (TWO, TALKS):
        first, again, other = (
            draw_script(scenario, rate=2.0, window_s=60.0, seed=seed) for seed in (3, 3, 4)
        )
        assert first == again
        assert first != other


def test_an_app_sends_the_same_whoever_is_beside_it():
    alone = Scenario(name="alone", apps=(replace(FEW, share=0.5),))
    beside = draw_script(TWO, rate=8.0, window_s=30.0, seed=5)
    own = [each for each in beside if each.app == "few"]
    assert own == draw_script(alone, rate=2.0, window_s=30.0, seed=5)


def test_conversations_are_open_from_the_start_and_come_back_at_the_rate():
    script = draw_script(TALKS, rate=2.0, window_s=300.0, seed=6)
    assert sum(each.talk.num_past_tokens > 0 for each in script) >= 5
    assert len(turns_due(script, 300.0)) == pytest.approx(600, rel=0.25)
    for each in script:
        assert each.due_ms() == sorted(each.due_ms())
        assert each.due_ms()[0] == each.talk.start_ms
        assert each.talk.num_tokens <= 2 * CHAT.session_tokens


def test_no_two_texts_begin_alike():
    script = draw_script(TWO, rate=20.0, window_s=10.0, seed=7)
    mix = itertools.islice(draw_mix(TWO, 7), 50)
    names = [each.name for each in (*script, *mix)]
    assert len({text_of(name, 100)[:16] for name in names}) == len(names)


def test_a_schedule_has_a_limit():
    with pytest.raises(ConfigError, match="more than 100000"):
        draw_script(TWO, rate=1e4, window_s=100.0, seed=0)


def test_what_measures_capacity_goes_by_share_of_requests():
    sent = list(itertools.islice(draw_mix(TWO, 1), 400))
    assert sum(each.app == "few" for each in sent) == 100
    both = Scenario(name="both", apps=(replace(CHAT, share=1.0), replace(MANY, share=1.0)))
    turns = {"chat": 0, "many": 0}
    for each in itertools.islice(draw_mix(both, 1), 1000):
        turns[each.app] += len(each.talk.turns)
        assert each.talk.num_past_tokens == 0
    assert turns["chat"] == pytest.approx(turns["many"], rel=0.1)


def test_the_usual_workloads_grow_with_the_unit():
    for unit in (256, 1024):
        prefill, turns = usual_scenarios(unit)
        short, long = prefill.apps
        assert short.prompt_tokens == (unit // 16, unit // 8)
        assert long.prompt_tokens == (unit * 3 // 4, unit * 5 // 4)
        assert (short.priority, long.priority) == ("interactive", "background")
        assert [app.kind for app in turns.apps] == ["conversations"]


def test_texts_are_as_long_as_the_scale_says():
    scale = TextScale.of((64, 50), (1024, 290))  # a token has 4 characters, 34 are around
    assert scale == TextScale(chars_per_token=4.0, num_fixed=34.0)
    assert scale.num_chars(134) == 400
    assert scale.num_chars(1) == 8  # something must be said
    assert text_of("a", 400)[9:] != text_of("b", 400)[9:]
    assert len(text_of("a", 400)) == 409
    assert text_of("a", 20_000) == text_of("a", 20_000)
    assert TextScale.of((64, 0), (1024, 0)) == TextScale()  # a server that does not say
