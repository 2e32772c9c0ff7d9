"""How a model's makers mean it to be sampled, and who has the last word."""

import pytest
from fuzz import fuzz
from hypothesis import strategies as st

from edgekv.config import Sampling, SamplingParams
from edgekv.tokenizer.makers import folder_sampling, gguf_sampling

# generation_config.json of public models, and what of sampling it says.
FOLDERS = {
    "Llama-3.2-1B-Instruct": {
        "bos_token_id": 128000,
        "do_sample": True,
        "eos_token_id": [128001, 128008, 128009],
        "temperature": 0.6,
        "top_p": 0.9,
    },
    "Qwen2.5-0.5B-Instruct": {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.1,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
    },
    "gemma-3-1b-it": {
        "cache_implementation": "hybrid",
        "do_sample": True,
        "eos_token_id": [1, 106],
        "top_k": 64,
        "top_p": 0.95,
    },
    "SmolLM2-135M-Instruct": {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    "greedy, with a penalty": {"do_sample": False, "repetition_penalty": 1.2, "top_k": 5},
    "no word on sampling": {"temperature": 0.6},
}
MEANT = {
    "Llama-3.2-1B-Instruct": {"temperature": 0.6, "top_p": 0.9},
    "Qwen2.5-0.5B-Instruct": {
        **{"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    },
    "gemma-3-1b-it": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "SmolLM2-135M-Instruct": {"temperature": 0.0},
    "greedy, with a penalty": {"temperature": 0.0, "repetition_penalty": 1.2, "top_k": 5},
    "no word on sampling": {"temperature": 0.0},
}
IDS = st.integers(0, 300)
FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_generation_config_means_what_it_says(name):
    assert folder_sampling(FOLDERS[name]) == (SamplingParams(**MEANT[name]), [])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_read_as_transformers_reads_it(name):
    from transformers import GenerationConfig

    read = GenerationConfig.from_dict(dict(FOLDERS[name]))
    sampling, _ = folder_sampling(FOLDERS[name])
    for field in FIELDS[1:]:
        assert getattr(sampling, field) == getattr(read, field)
    samples = read.do_sample is True
    assert sampling.temperature == ((read.temperature or 1.0) if samples else 0.0)


def test_a_file_without_a_word_leaves_all_open():
    assert folder_sampling({}) == (SamplingParams(), [])
    assert gguf_sampling({"general.name": "tiny"}) == (SamplingParams(), [])


@pytest.mark.parametrize(
    ("values", "left", "told"),
    [
        ({"temperature": "hot"}, {}, "temperature"),
        ({"temperature": -1}, {}, "temperature"),
        ({"temperature": 0.5, "top_k": 2.5}, {"temperature": 0.5}, "top_k"),
        ({"top_p": -0.5}, {"temperature": 1.0}, "top_p"),
        ({"top_k": True}, {"temperature": 1.0}, "top_k"),
        ({"repetition_penalty": [1.1]}, {"temperature": 1.0}, "repetition_penalty"),
        ({"top_p": None, "top_k": None}, {"temperature": 1.0}, None),
        ({"num_beams": 4}, {"temperature": 1.0}, "num_beams is 4"),
        ({"no_repeat_ngram_size": 3}, {"temperature": 1.0}, "no_repeat_ngram_size"),
        ({"num_beams": 1, "typical_p": 1.0, "suppress_tokens": []}, {"temperature": 1.0}, None),
    ],
)
def test_what_makes_no_sense_or_is_not_done_is_told_and_left_out(values, left, told):
    sampling, remarks = folder_sampling({"do_sample": True} | values)
    assert sampling == SamplingParams(**left)
    assert [told in remark for remark in remarks] == ([True] if told else [])


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ({"temp": 0.6000000238418579, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        (
            {"top_p": 0.949999988079071, "top_k": 64},
            {"temperature": 1.0, "top_p": 0.95, "top_k": 64},
        ),
        ({"temp": -1.0}, {"temperature": 0.0}),
        ({"temp": 0.0, "min_p": 0.05}, {"temperature": 0.0, "min_p": 0.05}),
        ({"temp": 0.5, "top_k": -1}, {"temperature": 0.5, "top_k": 0}),
        ({"penalty_repeat": 1.1}, {"repetition_penalty": 1.1}),
        ({"penalty_repeat": 1.1, "penalty_last_n": 64}, {"repetition_penalty": 1.1}),
        ({"penalty_repeat": 1.1, "penalty_last_n": 0}, {}),
        ({"sequence": "top_k;temperature"}, {}),
    ],
)
def test_a_gguf_file_means_what_llama_cpp_takes_it_to_mean(values, meant):
    metadata = {f"general.sampling.{key}": value for key, value in values.items()}
    assert gguf_sampling(metadata) == (SamplingParams(**meant), [])


@pytest.mark.parametrize("key", ["temp", "top_k", "top_p", "min_p", "penalty_repeat"])
@pytest.mark.parametrize("value", ["0.5", float("nan"), float("inf"), [1], True])
def test_a_strange_value_in_a_gguf_file_is_left_out(key, value):
    sampling, remarks = gguf_sampling({f"general.sampling.{key}": value})
    assert len(remarks) == 1
    assert sampling == SamplingParams()


def test_mirostat_is_told():
    assert "mirostat" in gguf_sampling({"general.sampling.mirostat": 2})[1][0]


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-2, 300),
        st.floats(),
        st.floats(0, 2),
        st.text(max_size=3),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)
NAMES = [*FIELDS, "do_sample", "num_beams", "no_repeat_ngram_size", "suppress_tokens"]


@fuzz(
    examples=200,
    values=st.dictionaries(st.sampled_from(NAMES), JSON),
    said=st.fixed_dictionaries({}, optional={"temperature": st.floats(0, 2), "top_k": IDS}),
)
def test_whatever_a_file_says_a_request_can_be_made(values, said):
    keys = {f"general.sampling.{key}": value for key, value in values.items()}
    keys["general.sampling.temp"] = values.get("temperature", 0.5)
    for makers, remarks in (folder_sampling(values), gguf_sampling(keys)):
        sampling = SamplingParams(**said).over(makers)
        for name, value in said.items():
            assert getattr(sampling, name) == value
        assert all(isinstance(remark, str) and "\n" not in remark for remark in remarks)
        assert sampling.temperature >= 0


MAKERS = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}),
        ({"temperature": 0}, {}),
        ({"temperature": 0.0, "top_k": 3}, {"top_k": 3}),
        ({"temperature": 0.0, "repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        (
            {"temperature": 0.2, "top_p": 1.0},
            {"temperature": 0.2, "top_k": 20, "repetition_penalty": 1.1},
        ),
        (
            {"max_tokens": 5, "stop": ("x",), "ignore_eos": True, "logprobs": 0, "top_k": 0},
            {
                **{"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1},
                **{"max_tokens": 5, "stop": ("x",), "ignore_eos": True, "logprobs": 0},
            },
        ),
    ],
)
def test_the_caller_first_then_the_makers(said, expected):
    assert SamplingParams(**said, seed=1).over(MAKERS) == Sampling(**expected, seed=1)


def test_where_nobody_says_anything_the_likeliest_token():
    assert SamplingParams(seed=1).over(SamplingParams()) == Sampling(seed=1)
    assert Sampling().greedy


def test_who_leaves_nothing_open_is_not_overruled():
    assert Sampling(max_tokens=3).over(MAKERS) == Sampling(max_tokens=3)


def test_a_seed_is_drawn_where_nobody_says_one():
    seeds = {SamplingParams().over(MAKERS).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 53 for seed in seeds)
