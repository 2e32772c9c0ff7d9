import pytest

from edgekv.bench.speed.scenarios import decode_workloads
from edgekv.bench.workload import TEXT, TextIds, Workload, check_fits, ragged_lengths
from edgekv.errors import ConfigError


class WordTokenizer:
    """Every word of a text is a token."""

    def __init__(self, prefix_ids=()):
        self.prefix_ids = prefix_ids
        self.words = {}

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [self.words.setdefault(word, len(self.words) + 10) for word in text.split()]


@pytest.mark.parametrize("num_tokens", [1, 2, 100, 5000])
@pytest.mark.parametrize("prefix_ids", [(), (1,)])
def test_prompts_have_exactly_the_length_that_was_asked(num_tokens, prefix_ids):
    ids = TextIds(WordTokenizer(prefix_ids)).prompt(num_tokens, 0)
    assert len(ids) == num_tokens
    assert tuple(ids[:1]) == prefix_ids or not prefix_ids


def test_prompts_of_different_sessions_begin_differently():
    text = TextIds(WordTokenizer())
    prompts = [tuple(text.prompt(16, i)) for i in range(64)]
    assert len(set(prompts)) == 64


def test_the_text_goes_round():
    tokenizer = WordTokenizer()
    length = len(tokenizer.encode(TEXT, add_special_tokens=False))
    ids = TextIds(tokenizer).prompt(2 * length, 3)
    assert ids[:length] == ids[length:]


def test_ragged_lengths_are_spread_evenly_and_always_the_same():
    lengths = ragged_lengths(64, 1024, 8)
    assert sorted(lengths) == [64, 201, 338, 475, 613, 750, 887, 1024]
    assert list(lengths) != sorted(lengths)
    assert ragged_lengths(64, 1024, 8) == lengths
    assert ragged_lengths(64, 1024, 1) == (544,)
    assert ragged_lengths(7, 7, 3) == (7, 7, 7)


@pytest.mark.parametrize(
    ("low", "high", "count"), [(0, 8, 2), (9, 8, 2), (1, 1 << 21, 2), (1, 2, 0)]
)
def test_ragged_lengths_out_of_range(low, high, count):
    with pytest.raises(ConfigError):
        ragged_lengths(low, high, count)


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": ()},
        {"lengths": (0,)},
        {"lengths": (-5,)},
        {"lengths": (1 << 30,)},
        {"lengths": (8,) * 257},
        {"new_tokens": 1},
        {"new_tokens": 1 << 20},
        {"reps": 0},
        {"reps": 1_000_000},
    ],
)
def test_absurd_workloads_are_refused(change):
    with pytest.raises(ConfigError) as caught:
        Workload(**({"lengths": (8,), "new_tokens": 4, "reps": 1} | change))
    assert caught.value.hint


def test_a_workload_must_fit_in_the_context():
    workload = Workload(lengths=(8, 100), new_tokens=4, reps=1)
    check_fits([workload], 108)
    with pytest.raises(ConfigError, match="context of 107"):
        check_fits([workload], 107)


def decode_options(**changes):
    options = {
        "sessions": None,
        "ragged": None,
        "lengths": None,
        "prompt_tokens": 128,
        "new_tokens": 64,
        "reps": 5,
    }
    return options | changes


def test_decode_uniform():
    workloads = decode_workloads(**decode_options(sessions=[1, 3]))
    assert [w.lengths for w in workloads] == [(128,), (128, 128, 128)]
    assert [len(w.lengths) for w in decode_workloads(**decode_options())] == [1, 2, 4, 8]


def test_decode_ragged():
    (workload,) = decode_workloads(**decode_options(sessions=[8], ragged=(64, 1024)))
    assert workload.lengths == ragged_lengths(64, 1024, 8)


@pytest.mark.parametrize("sessions", [None, [3]])
def test_decode_lengths(sessions):
    (workload,) = decode_workloads(**decode_options(sessions=sessions, lengths=[2048, 128, 128]))
    assert workload.lengths == (2048, 128, 128)


@pytest.mark.parametrize("contradiction", [{"sessions": [2]}, {"ragged": (1, 2)}])
def test_decode_options_that_contradict_each_other(contradiction):
    with pytest.raises(ConfigError, match="3 sessions"):
        decode_workloads(**decode_options(lengths=[1, 2, 3], **contradiction))
