"""The folder that `bench serve` gives its peer, and mlx-lm's server on it."""

import asyncio
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper
from tiny_gguf import write_gguf
from tiny_models import random_ids, tiny_config, write_folder

from edgekv.bench.serving import peer_folder
from edgekv.bench.serving.client import Client, Endpoint
from edgekv.bench.serving.peer_folder import write_peer_folder
from edgekv.bench.serving.play import Player
from edgekv.bench.serving.schedule import TextScale
from edgekv.bench.serving.serve import ServeOptions, run_serve
from edgekv.bench.serving.targets import MlxLmServe
from edgekv.bench.serving.traffic import AppTraffic, Scenario
from edgekv.bench.speed import peer_mlx_lm
from edgekv.errors import UnsupportedModel
from edgekv.models.open_model import open_checkpoint, open_tokenizer
from edgekv.models.weights import load_decoder

pytestmark = pytest.mark.slow

IDS = random_ids(40)
CHAT = [{"role": "user", "content": "Alice was beginning to get very tired <|im_end|> of sitting."}]


def write_model(tmp_path, form):
    config = tiny_config("llama", tie_word_embeddings=True)
    if form == "folder":
        return write_folder(tmp_path / "model", config)
    write_gguf(tmp_path / "model.gguf", config, kind=Kind.Q8_0)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "quantised"])
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_the_peer_reads_our_numbers_and_our_tokens(form, quantised, tmp_path, monkeypatch):
    device = FUSED_PROFILE if quantised else CPU_PROFILE
    monkeypatch.setattr(peer_folder, "profile", lambda: device)
    path = write_model(tmp_path, form)
    folder = write_peer_folder(path, tmp_path / "peer")
    model, theirs = peer_mlx_lm._import("utils").load(str(folder))
    expected = Stepper(load_decoder(open_checkpoint(path, device), device)).logits(IDS)
    actual = np.array(model(mx.array([IDS]))[0].astype(mx.float32))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)

    ours = open_tokenizer(path)
    text = CHAT[0]["content"].replace("<|im_end|> ", "")
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(
        text, add_special_tokens=False
    )
    plain = [{"role": "user", "content": text}]
    ids = theirs.apply_chat_template(plain, add_generation_prompt=True)
    assert list(ids) == ours.encode_chat(ours.render_chat(plain))
    assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False)
    assert set(theirs.eos_token_ids) == set(ours.eos_ids)


def test_a_gguf_file_with_sentencepiece_is_refused(tmp_path, monkeypatch):
    path = write_model(tmp_path, "gguf")
    other = replace(open_tokenizer(path), backend=object())
    monkeypatch.setattr(peer_folder, "open_tokenizer", lambda path: other)
    with pytest.raises(UnsupportedModel, match="SentencePiece") as caught:
        write_peer_folder(path, tmp_path / "peer")
    assert "folder" in caught.value.hint


@pytest.mark.long
def test_mlx_lms_server_is_played(tmp_path):
    """Started twice: for one question, and for a whole play beside a server that runs."""
    path = write_model(tmp_path, "folder")
    server = MlxLmServe(write_peer_folder(path, tmp_path / "peer"))
    editor = AppTraffic(name="editor", prompt_tokens=(30, 60), output_tokens=(6, 6))
    chat = AppTraffic(name="chat", kind="conversations", users=3, session_tokens=100)

    async def ask(endpoint):
        async with Client(endpoint, [editor]) as client:
            return await Player(client, TextScale()).ask_once("editor", "one", 100, 6)

    with server.open([editor], 1 << 24) as endpoint:
        answer = asyncio.run(ask(endpoint))
        assert answer.fault is None
        assert answer.num_prompt_tokens > 50
        assert 0 < answer.num_output_tokens <= 6
        running = Endpoint(name="running", url=endpoint.url, model=endpoint.model)
        options = ServeOptions(
            scenario=Scenario(name="mine", apps=(editor, chat)),
            targets=(running,),
            peer="mlx-lm",
            duration_s=2.0,
            rate=4.0,
        )
        rows = run_serve(str(path), options)
    assert [row["target"] for row in rows] == ["running"] * 2 + ["mlx-lm"] * 2
    assert all(row["requests"] > 0 for row in rows)
    assert all(row["answered"] + row["unanswered"] == row["requests"] for row in rows)
    assert rows[0]["answered"] > 0
    assert rows[3]["cached_tokens"] > 0, "turns go on from what was said"
    assert rows[2]["ratio"]["ttft_ms_p50"] is not None
