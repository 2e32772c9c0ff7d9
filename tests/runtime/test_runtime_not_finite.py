"""Logits that are no numbers end the request that they are of, by name, and nobody else's."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import random_tensors, tiny_config, write_folder
from tiny_predictors import random_ids, write_predictors
from tiny_runtime import answer, sampling

from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions
from edgekv.errors import LogitsNotFinite
from edgekv.runtime import Runtime

BAD = 200  # the token whose embedding is damaged
GOOD = list(range(20, 40))


def write_damaged(folder, damage):
    config = tiny_config("llama")
    tensors = random_tensors(config)
    damage(tensors)
    return str(write_folder(folder, config, tensors=tensors))


def damage_token(tensors):
    tensors["model.embed_tokens.weight"][BAD] = np.nan
    tensors["lm_head.weight"][BAD] = 0.0  # so that no answer of 288 random logits holds it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_damaged(tmp_path_factory.mktemp("damaged") / "m", damage_token)


@pytest.fixture
def runtime(folder, tmp_path):
    config = RuntimeConfig(pool_bytes=1 << 26, store=StoreOptions(folder=tmp_path))
    with Runtime.open(folder, config=config) as runtime:
        yield runtime
        runtime.check_integrity()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 1},
        {"temperature": 1.0, "min_p": 0.1, "seed": 1},
        {"repetition_penalty": 1.5},
        {"logprobs": 2},
    ],
)
def test_the_layer_is_named_and_the_session_is_as_before(runtime, options):
    session = runtime.app().session()
    with pytest.raises(LogitsNotFinite, match="layer 0 of 3") as caught:
        answer(session, [*GOOD, BAD, 21], sampling(8, **options))
    assert "the first 22" in str(caught.value)
    assert "overflow" in caught.value.hint
    runtime.check_integrity()
    assert session.last_reply is None
    again = answer(session, GOOD, sampling(8))
    assert again.stats.num_cached_tokens == 0
    assert again.token_ids == answer(runtime.app().session(), GOOD, sampling(8)).token_ids


def test_others_go_on(runtime):
    expected = answer(runtime.app().session(), GOOD, sampling(300)).token_ids
    stream = runtime.app("calm").session().submit_ids(GOOD, sampling(300))
    heard = [next(stream)]
    failures = []

    def fail():
        try:
            answer(runtime.app("odd").session(), [BAD], sampling(5))
        except LogitsNotFinite as error:
            failures.append(error)

    threads = [threading.Thread(target=fail) for _ in range(3)]
    for thread in threads:
        thread.start()
    heard += list(stream)
    for thread in threads:
        thread.join()
    assert len(failures) == 3
    assert sum((delta.token_ids for delta in heard), ()) == expected


@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("model.layers.0.self_attn.v_proj.weight", "layer 0 of 3"),
        ("model.layers.0.mlp.down_proj.weight", "layer 1 of 3"),
        ("model.layers.1.mlp.up_proj.weight", "layer 2 of 3"),
        ("model.layers.2.mlp.up_proj.weight", "all 3 layers keep, which is sound"),
        ("lm_head.weight", "all 3 layers keep, which is sound"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_damaged_is_found(tmp_path, tensor, where, value):
    def damage(tensors):
        tensors[tensor][:] = value

    with Runtime.open(
        write_damaged(tmp_path / "m", damage),
        config=RuntimeConfig(pool_bytes=1 << 26, store=StoreOptions(disk_bytes=0)),
    ) as runtime:
        for _ in range(2):  # the runtime outlives it
            with pytest.raises(LogitsNotFinite, match=where):
                runtime.app().session().respond("Hi", sampling=sampling(4))
        runtime.check_integrity()


def test_a_score_of_it_is_no_number(runtime):
    assert np.isfinite(runtime.score(GOOD)).all()
    with pytest.raises(LogitsNotFinite, match="behind token"):
        runtime.score([20, 21, BAD, 22])
    assert np.isnan(runtime.logits([20, 21, BAD])[2]).all()  # those are told as they are


def test_what_is_on_disk_of_it_is_forgotten_too(runtime):
    session = runtime.app().session("kept")
    answer(session, GOOD * 5, sampling(4))
    assert session.suspend() > 0
    with pytest.raises(LogitsNotFinite):
        answer(session, [*GOOD * 5, BAD], sampling(4))
    assert session.suspend() == 0
    # Nor does another session of the app find it there.
    reply = answer(runtime.app().session(), [*GOOD * 5, 7], sampling(2))
    assert reply.stats.num_cached_tokens == 0


def test_a_conversation_can_go_on(runtime):
    session = runtime.app().session("talk")
    session.respond("Hello", sampling=sampling(3))
    before = session.messages
    with pytest.raises(LogitsNotFinite):
        answer(session, [BAD], sampling(3))
    assert session.messages == before
    assert session.respond("Go on", sampling=sampling(3)).finish_reason == "length"


@pytest.mark.parametrize("kind", ["self", "aux"])
def test_prediction_over_it_ends_so_too(tmp_path, kind):
    whole = write_folder(tmp_path / "whole", tiny_config("llama", num_hidden_layers=4))
    predictor = write_predictors(whole, tmp_path, kind)[kind]
    prediction = PredictionOptions(predictor=predictor, aux=str(whole), prefill="predict")
    config = RuntimeConfig(prediction=prediction, store=StoreOptions(disk_bytes=0))
    with Runtime.open(str(whole), config=config) as runtime:
        layer = runtime._engine._the_loop().runner.decoder.weights.layers[3]
        layer.attn_norm[:] = np.nan  # from now on
        mx.eval(layer.attn_norm)  # so that the engine's thread can use it
        session = runtime.app().session()
        for _ in range(2):
            with pytest.raises(LogitsNotFinite, match="layer 3 of 4"):
                answer(session, random_ids(120, 1), sampling(4))
            runtime.check_integrity()
