"""`edgekv models check` and `show`, on tiny models here and on a small Hub on the loopback."""

import json
import os
import pathlib
import subprocess
import sys

import huggingface_hub.constants
import pytest
from command_errors import error_of
from fake_hub import FakeHub, FakeRepo, in_place_of_the_hub
from gguf import GGMLQuantizationType as Kind
from stepping import CPU_PROFILE
from tiny_gguf import write_gguf
from tiny_models import random_tensors, tiny_config, write_folder

from edgekv import device
from edgekv.cli.main import main
from edgekv.models.hub import resolve

PARAMETERS = sum(values.size for values in random_tensors(tiny_config("llama")).values())
TOKEN_BYTES = 2 * 3 * 2 * 16 * 4  # K and V, layers, kv heads, head_dim, f32
GRANULE = 128  # tokens: 16 KiB / (2 kv heads * 16 * 4 bytes)
POOL_GIB = (GRANULE * TOKEN_BYTES * 5) / (1 << 30)  # four granules, and what stages KV


@pytest.fixture(autouse=True)
def _small_device(monkeypatch):
    monkeypatch.setattr(device, "profile", lambda: CPU_PROFILE)


@pytest.fixture
def llama(tmp_path) -> pathlib.Path:
    return write_folder(tmp_path / "llama", tiny_config("llama"))


@pytest.fixture
def hub(tmp_path, llama, monkeypatch):
    """A Hub with the tiny model, as a folder and as a GGUF file."""
    write_gguf(tmp_path / "q8.gguf", tiny_config("qwen3"), kind=Kind.Q8_0)
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    ggufs = {"q8.gguf": (tmp_path / "q8.gguf").read_bytes()}
    repos = {"owner/tiny": FakeRepo.of(files), "owner/gguf": FakeRepo.of(ggufs)}
    with in_place_of_the_hub(FakeHub(repos), tmp_path / "hf", monkeypatch) as served:
        yield served


def facts_of(capsys, *arguments: str, code: int = 0) -> dict:
    assert main(["models", *arguments, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_a_folder_in_words(llama, capsys):
    assert main(["models", "check", str(llama)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"model      {llama}",
        "loads      yes",
        "family     llama: 3 layers, 1,024 tokens of context",
        "weights    0.129 M parameters, 518 kB on disk: F32 518 kB",
        "in memory  518 kB",
        "KV         768 bytes a token; a session 786 kB at 1,024 tokens",
        "pool       67.1 MB: holds a session of 1,024 tokens",
        "machine    fits: weights and pool need 101.2 MB of 1.1 GB",
    ]


def test_facts_of_a_folder(llama, capsys):
    assert facts_of(capsys, "check", str(llama)) == {
        "model": str(llama),
        "loads": True,
        "reason": None,
        "hint": None,
        "family": "llama",
        "num_layers": 3,
        "context_max": 1024,
        "weights": {
            "num_parameters": PARAMETERS,
            "num_bytes": 4 * PARAMETERS,
            "types": {"F32": {"num_parameters": PARAMETERS, "num_bytes": 4 * PARAMETERS}},
        },
        "memory_bytes": 4 * PARAMETERS,
        "kv": {
            "token_bytes": TOKEN_BYTES,
            "sessions": [{"num_tokens": 1024, "num_bytes": 1024 * TOKEN_BYTES}],
        },
        "pool": {"num_bytes": CPU_PROFILE.pool_bytes, "session_tokens_max": 1024},
        "machine": {
            "needed_bytes": 4 * PARAMETERS + CPU_PROFILE.pool_bytes + CPU_PROFILE.freed_bytes_max,
            "memory_bytes": CPU_PROFILE.memory_bytes,
            "fits": True,
        },
    }


def test_a_long_context_and_a_pool_that_is_too_small_for_it(tmp_path, capsys):
    config = tiny_config("llama", max_position_embeddings=131_072)
    folder = write_folder(tmp_path, config)
    found = facts_of(capsys, "check", str(folder), "--pool-gib", str(POOL_GIB))
    assert [one["num_tokens"] for one in found["kv"]["sessions"]] == [8192, 131_072]
    assert [one["num_bytes"] for one in found["kv"]["sessions"]] == [
        8192 * TOKEN_BYTES,
        131_072 * TOKEN_BYTES,
    ]
    assert found["pool"]["session_tokens_max"] == 4 * GRANULE
    small = facts_of(capsys, "check", str(folder), "--pool-gib", str(POOL_GIB / 10))
    assert small["pool"]["session_tokens_max"] == 0
    assert main(["models", "check", str(folder), "--pool-gib", str(POOL_GIB / 10)]) == 0
    assert "pool       49 kB: holds no session" in capsys.readouterr().out


def test_a_machine_that_is_too_small(llama, capsys):
    assert main(["models", "check", str(llama), "--pool-gib", "2"]) == 0
    assert "machine    does not fit: weights and pool need 2.2 GB of 1.1 GB" in (
        capsys.readouterr().out
    )


# --- on the Hub ---


def test_a_repository_is_checked_as_its_folder_is_without_downloading(hub, llama, capsys, tmp_path):
    there = facts_of(capsys, "check", "owner/tiny")
    assert there == facts_of(capsys, "check", str(llama)) | {"model": "owner/tiny"}
    assert not (tmp_path / "hf").exists()
    size = (llama / "model.safetensors").stat().st_size
    assert hub.num_bytes_sent < size
    assert main(["models"]) == 0
    assert "owner" not in capsys.readouterr().out


def test_a_gguf_file_of_a_repository(hub, tmp_path, capsys):
    there = facts_of(capsys, "check", "owner/gguf/q8.gguf")
    path = str(tmp_path / "q8.gguf")
    assert there == facts_of(capsys, "check", path) | {"model": "owner/gguf/q8.gguf"}
    assert list(there["weights"]["types"]) == ["Q8_0", "F32"]


def test_show_never_asks_the_hub(hub, capsys):
    assert main(["models", "show", "owner/tiny"]) == 1
    assert error_of(capsys) == (
        "error: owner/tiny is not downloaded completely",
        "hint: run once with the network allowed: edgekv pull owner/tiny",
    )
    assert hub.requests == []
    resolve("owner/tiny")
    hub.requests.clear()
    assert facts_of(capsys, "show", "owner/tiny")["kv"]["token_bytes"] == TOKEN_BYTES
    assert facts_of(capsys, "check", "owner/tiny")["loads"]
    assert hub.requests == []


def test_offline(hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["models", "check", "owner/tiny"]) == 1
    assert "is not downloaded" in error_of(capsys)[0]
    assert hub.requests == []


def test_what_is_not_known_is_an_error_and_no_verdict(hub, capsys):
    hub.gated.add("owner/tiny")
    assert main(["models", "check", "owner/tiny", "--json"]) == 1
    assert "owner/tiny is gated" in error_of(capsys)[0]
    assert main(["models", "check", "owner/none"]) == 1
    assert "no such model" in error_of(capsys)[0]


# --- what does not load ---


def refused(repo: FakeRepo, **changes: bytes | None) -> None:
    (files,) = repo.commits.values()
    for name, raw in changes.items():
        files[name.replace("__", ".")] = raw


def test_an_unknown_family_on_the_hub(hub, capsys):
    config = tiny_config("llama", model_type="mamba")
    refused(hub.repos["owner/tiny"], config__json=json.dumps(config).encode())
    found = facts_of(capsys, "check", "owner/tiny", code=1)
    assert (found["loads"], found["family"], found["kv"], found["machine"]) == (False, *[None] * 3)
    assert found["reason"] == "owner/tiny/config.json: model_type 'mamba' is not supported"
    assert "llama" in found["hint"]
    assert found["weights"]["num_bytes"] == 4 * PARAMETERS
    assert main(["models", "check", "owner/tiny"]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[1:3] == [
        f"loads      no: {found['reason']}",
        f"hint       {found['hint']}",
    ]


def test_gptq_on_the_hub(hub, capsys):
    config = tiny_config("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(hub.repos["owner/tiny"], config__json=json.dumps(config).encode())
    found = facts_of(capsys, "check", "owner/tiny", code=1)
    assert found["reason"] == "owner/tiny/config.json: quantised by 'gptq'"
    assert found["weights"] is None


def test_a_broken_file_on_the_hub(hub, capsys):
    refused(hub.repos["owner/tiny"], model__safetensors=b"\xff" * 40)
    found = facts_of(capsys, "check", "owner/tiny", code=1)
    assert found["reason"].startswith("owner/tiny/model.safetensors: header of")
    assert "on the Hub" in found["hint"]


def test_a_broken_file_here(llama, capsys):
    raw = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(raw[:-1])
    found = facts_of(capsys, "check", str(llama), code=1)
    assert "ends at byte" in found["reason"]
    assert "copy it anew" in found["hint"]


def test_a_missing_tensor_leaves_the_rest_known(tmp_path, capsys):
    tensors = random_tensors(tiny_config("llama"))
    del tensors["model.layers.2.mlp.down_proj.weight"]
    folder = write_folder(tmp_path, tiny_config("llama"), tensors=tensors)
    found = facts_of(capsys, "check", str(folder), code=1)
    assert "tensor 'model.layers.2.mlp.down_proj.weight' is missing" in found["reason"]
    assert found["kv"]["token_bytes"] == TOKEN_BYTES
    assert found["memory_bytes"] is None


def test_control_sequences_of_a_model_stay_out_of_the_terminal(llama, capsys):
    config = tiny_config("llama", model_type="\x1b[31mmamba")
    (llama / "config.json").write_text(json.dumps(config))
    assert main(["models", "check", str(llama)]) == 1
    assert "\x1b" not in capsys.readouterr().out


# --- as a command ---


def test_the_list_of_models_takes_no_name(capsys):
    assert main(["models", "owner/tiny"]) == 2
    assert "owner/tiny" in error_of(capsys)[0]


@pytest.mark.slow
def test_the_endpoint_of_the_environment_is_asked(hub, tmp_path):
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "edgekv.cli.main", "models", "check", "owner/tiny", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights"]["num_parameters"] == PARAMETERS
    assert not (tmp_path / "home").exists()
