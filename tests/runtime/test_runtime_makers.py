"""Who says nothing gets the sampling that the model's makers mean, and every reply says which."""

import json
import shutil

import pytest
from tiny_gguf import write_gguf
from tiny_models import tiny_config
from tiny_runtime import answer, greedy_by_hand

from edgekv.config import RuntimeConfig, Sampling, SamplingParams, StoreOptions
from edgekv.runtime import Runtime

MEANT = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
IDS = list(range(30, 50))
CONFIG = RuntimeConfig(pool_bytes=1 << 26, store=StoreOptions(disk_bytes=0))


@pytest.fixture(params=["folder", "gguf"])
def runtime(request, tiny_folder, tmp_path):
    if request.param == "folder":
        path = shutil.copytree(tiny_folder, tmp_path / "m")
        (path / "generation_config.json").write_text(json.dumps({"do_sample": True, **MEANT}))
    else:
        path = tmp_path / "m.gguf"
        keys = {"temperature": "temp"}
        extra = {f"general.sampling.{keys.get(k, k)}": v for k, v in MEANT.items()}
        write_gguf(path, tiny_config("llama"), metadata=extra)
    with Runtime.open(str(path), config=CONFIG) as runtime:
        yield runtime


def ask(runtime, **said):
    params = SamplingParams(max_tokens=24, ignore_eos=True, **said)
    return answer(runtime.app().session(), IDS, params)


def test_nothing_said_is_as_the_makers_say(runtime):
    reply = ask(runtime)
    used = reply.stats.sampling
    assert {name: getattr(used, name) for name in MEANT} == MEANT
    assert reply.token_ids != ask(runtime).token_ids, "two seeds were drawn"
    # With the seed that the reply says the same answer can be had again.
    assert ask(runtime, seed=used.seed).token_ids == reply.token_ids
    assert answer(runtime.app().session(), IDS, used).token_ids == reply.token_ids


def test_a_temperature_of_0_is_greedy_whatever_they_say(runtime):
    reply = ask(runtime, temperature=0, seed=1)
    assert reply.stats.sampling == Sampling(max_tokens=24, ignore_eos=True, seed=1)
    assert list(reply.token_ids) == greedy_by_hand(runtime, IDS, 24)


def test_what_is_said_goes_before(runtime):
    used = ask(runtime, top_k=3, seed=5).stats.sampling
    assert (used.temperature, used.top_k, used.seed) == (0.9, 3, 5)


def test_a_conversation_is_sampled_so_too(runtime):
    reply = runtime.app().session().respond("Hello", sampling=SamplingParams(max_tokens=4))
    assert reply.stats.to_dict()["sampling"] | MEANT == reply.stats.to_dict()["sampling"]


def test_without_their_word_it_is_the_likeliest(tiny_folder):
    with Runtime.open(str(tiny_folder), config=CONFIG) as runtime:
        reply = ask(runtime)
        assert reply.stats.sampling.greedy
        assert list(reply.token_ids) == greedy_by_hand(runtime, IDS, 24)


def test_a_damaged_file_is_told_once(tiny_folder, tmp_path, capfd):
    path = shutil.copytree(tiny_folder, tmp_path / "m")
    (path / "generation_config.json").write_text("{")
    for _ in range(2):
        Runtime.open(str(path), config=CONFIG).close()
    told = [line for line in capfd.readouterr().err.splitlines() if "generation_config" in line]
    assert len(told) == 1
    assert told[0].startswith("warning: ")
