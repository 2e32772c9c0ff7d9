"""Headers of models on a small Hub on the loopback, fetched by range requests."""

import json
import pathlib
import struct

import huggingface_hub.constants
import pytest
from fake_hub import MODEL, PAGE, FakeHub, FakeRepo, in_place_of_the_hub, safetensors, sharded

from edgekv.errors import (
    CheckpointCorrupt,
    DownloadError,
    ModelNotFound,
    TokenizerError,
    UnsupportedModel,
)
from edgekv.models import gguf_file, safetensors_file
from edgekv.models.folder_files import find_shards
from edgekv.models.hub import headers_of, resolve
from edgekv.models.remote_file import FIRST_BYTES

NUM_TOKENS = 3000
HEAVY = safetensors(4_000_000)
FACTORS = struct.pack("<2f", 1.5, 8.0)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf() -> bytes:
    """A file with 3 MB of tokens, as much as a large vocabulary has, and a tensor of 4 MB."""
    tokens = [f"{i:01000d}" for i in range(NUM_TOKENS)]
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 2)
    head += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(tokens))
    head += b"".join(map(text, tokens))
    head += text("behind.it") + struct.pack("<II", 4, 7)
    head += text("rope_freqs.weight") + struct.pack("<IQIQ", 1, 2, 0, 0)
    head += text("blk.0.a.weight") + struct.pack("<IQIQ", 1, 1 << 20, 0, 32)
    head += bytes(-len(head) % 32)
    return head + FACTORS + bytes(32 - len(FACTORS)) + bytes(4 << 20)


GGUF = gguf()
REPOS = {
    "owner/folder": MODEL | {"model.safetensors": HEAVY},
    "owner/sharded": MODEL | sharded("a-1.safetensors", "b/2.safetensors"),
    "owner/gguf": {"sub/model.gguf": GGUF, "README.md": b""},
    "owner/torch": {"config.json": b"{}", "pytorch_model.bin": b""},
    "owner/no-tokenizer": {"config.json": b"{}", "model.safetensors": HEAVY},
    "owner/gated": MODEL,
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    repos = {name: FakeRepo.of(dict(files)) for name, files in REPOS.items()}
    hub = FakeHub(repos, gated={"owner/gated"})
    with in_place_of_the_hub(hub, tmp_path / "hf", monkeypatch):
        yield hub


def place(server: FakeHub, repo: str, files: dict[str, bytes]) -> str:
    """Put a repository on the Hub."""
    server.repos[repo] = FakeRepo.of(MODEL | files)
    return repo


def refusal(reference: str, kind: type[Exception]) -> Exception:
    with pytest.raises(kind) as caught, headers_of(reference):
        pass
    return caught.value


def assert_hollow(path: pathlib.Path, original: bytes, num_header_bytes: int) -> None:
    raw = path.read_bytes()
    assert len(raw) == len(original)
    assert raw[:num_header_bytes] == original[:num_header_bytes]
    assert not raw[2 * max(num_header_bytes, FIRST_BYTES) :].strip(b"\0")


def test_a_folder_comes_without_its_weights_and_leaves_nothing(server, tmp_path):
    with headers_of("owner/folder") as files:
        path = files.path
        assert path.parts[-2:] == ("owner", "folder")
        assert (path / "config.json").read_bytes() == b"{}"
        assert find_shards(path) == [path / "model.safetensors"]
        assert_hollow(path / "model.safetensors", HEAVY, 100)
        assert safetensors_file.read_header(path / "model.safetensors")["a"].shape == (4_000_000,)
    assert not path.exists()
    assert not (tmp_path / "hf").exists(), "the cache is as it was"
    assert server.ranges == [("model.safetensors", 0, FIRST_BYTES)]
    assert server.num_bytes_sent < FIRST_BYTES + 2000


def test_shards_are_those_that_the_index_names(server):
    with headers_of("owner/sharded") as files:
        shards = find_shards(files.path)
        assert [str(s.relative_to(files.path)) for s in shards] == [
            "a-1.safetensors",
            "b/2.safetensors",
        ]
        assert [safetensors_file.read_header(shard)["a"].end for shard in shards] == [
            len(raw) for name, raw in REPOS["owner/sharded"].items() if name[1] in "-/"
        ]


def test_a_header_longer_than_the_first_request_takes_one_more(server):
    names = {f"{i:0300d}": [i, i + 1] for i in range(1000)}
    tensors = {n: {"dtype": "U8", "shape": [1], "data_offsets": at} for n, at in names.items()}
    header = json.dumps(tensors).encode()
    raw = struct.pack("<Q", len(header)) + header + bytes(1000)
    assert len(header) > 2 * FIRST_BYTES
    with headers_of(place(server, "o/long", {"model.safetensors": raw})) as files:
        found = safetensors_file.read_header(files.path / "model.safetensors")
    assert len(found) == 1000
    (_, _, first), (_, start, end) = server.ranges
    assert (first, start) == (FIRST_BYTES, FIRST_BYTES)
    assert 8 + len(header) <= end < len(header) + 10_000


def test_a_gguf_header_is_read_as_far_as_it_goes_and_rope_factors_with_it(server, tmp_path):
    with headers_of("owner/gguf/sub/model.gguf") as files:
        assert files.path.parts[-3:] == ("gguf", "sub", "model.gguf")
        header = gguf_file.read_header(files.path)
        raw = files.path.read_bytes()
    assert header.metadata["behind.it"] == 7
    assert len(header.metadata["tokenizer.ggml.tokens"]) == NUM_TOKENS
    assert len(raw) == len(GGUF)
    rope = header.tensors["rope_freqs.weight"]
    assert raw[rope.start : rope.end] == FACTORS
    assert len(server.ranges) <= 6, "each asks for as much as all before"
    assert server.num_bytes_sent < 2 * rope.start + 10_000
    assert not (tmp_path / "hf").exists()


def test_where_files_are_elsewhere_the_range_is_asked_for_there(server):
    def stranger(command, path):
        if "/resolve/" not in path or path.endswith("?there"):
            return None
        return 302, {"Location": f"{server.endpoint}{path}?there"}, b""

    server.stranger = stranger
    with headers_of("owner/folder") as files:
        assert_hollow(files.path / "model.safetensors", HEAVY, 100)
    assert server.num_bytes_sent < FIRST_BYTES + 2000


# --- what is in the cache is read there ---


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["owner/folder", "owner/gguf/sub/model.gguf"])
def test_what_was_downloaded_is_not_asked_for(server, reference):
    path = resolve(reference)
    server.requests.clear()
    for offline in (False, True):
        with headers_of(reference, offline=offline) as files:
            assert files.path == path
    assert path.exists()
    assert server.requests == []


@pytest.mark.parametrize("by_environment", [True, False])
def test_offline_nothing_is_asked(server, monkeypatch, by_environment):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", by_environment)
    with (
        pytest.raises(DownloadError, match="owner/folder is not downloaded") as caught,
        headers_of("owner/folder", offline=not by_environment),
    ):
        pass
    assert "edgekv pull owner/folder" in caught.value.hint
    assert server.requests == []


# --- what is wrong there ---


@pytest.mark.parametrize(
    ("reference", "kind", "message", "hint"),
    [
        ("owner/nothing", ModelNotFound, "no such model on Hugging Face", "spelling"),
        ("owner/gated", DownloadError, "owner/gated is gated", "HF_TOKEN"),
        ("owner/gguf", UnsupportedModel, "no config.json", "owner/gguf/sub/model.gguf"),
        ("owner/gguf/q5.gguf", ModelNotFound, "no file q5.gguf", "sub/model.gguf"),
        ("owner/torch", UnsupportedModel, "no config.json", "safetensors"),
        ("owner/no-tokenizer", TokenizerError, "neither tokenizer.json nor", "made from"),
        ("owner/folder@v9", ModelNotFound, "no revision v9", "branches"),
    ],
)
def test_what_cannot_be_had(server, reference, kind, message, hint):
    error = refusal(reference, kind)
    assert message in str(error)
    assert hint in error.hint


def test_a_repository_for_which_one_must_log_in(server):
    server.stranger = lambda *request: (401, {}, b"")
    error = refusal("owner/folder", DownloadError)
    assert "(401)" in str(error)
    assert "hf auth login" in error.hint


HEADER = len(json.dumps({"a": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}}))
BROKEN = {
    "empty": (b"", "0 bytes are too few"),
    "cut in its length": (safetensors()[:5], "5 bytes are too few"),
    "cut in its header": (safetensors()[:30], f"header of {HEADER} bytes exceeds the file's 30"),
    "cut in its data": (safetensors()[:-1], "ends at byte"),
    "a header longer than the file": (
        struct.pack("<Q", 5000) + b"{}",
        "header of 5000 bytes exceeds the file's 10",
    ),
    "a header longer than any": (struct.pack("<Q", 1 << 60) + bytes(100), "exceeds the limit"),
    "no JSON": (struct.pack("<Q", 4) + b"{]}}" + bytes(8), "not valid JSON"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n" + bytes(90), "Git LFS"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_refused_by_its_name_on_the_hub(server, name):
    raw, message = BROKEN[name]
    error = refusal(place(server, "o/broken", {"model.safetensors": raw}), CheckpointCorrupt)
    assert str(error).startswith("o/broken/model.safetensors")
    assert message in str(error)
    assert "on the Hub" in error.hint
    assert "pull" not in error.hint


@pytest.mark.parametrize("keep", [0, 3, 30, 200_000, len(GGUF) - 1])
def test_a_gguf_file_that_is_cut(server, keep):
    place(server, "o/cut", {"a.gguf": GGUF[:keep]})
    error = refusal("o/cut/a.gguf", CheckpointCorrupt)
    assert str(error).startswith("o/cut/a.gguf: ")


def test_a_shard_that_is_missing(server):
    place(server, "o/lacks", sharded("a-1.safetensors", "b-2.safetensors"))
    del server.repos["o/lacks"].commits["b" * 40]["b-2.safetensors"]
    assert "names b-2.safetensors, which it does not have" in str(
        refusal("o/lacks", UnsupportedModel)
    )


def test_a_broken_index_is_named_as_on_the_hub(server):
    place(server, "o/index", {"model.safetensors.index.json": b"{"})
    error = refusal("o/index", CheckpointCorrupt)
    assert str(error).startswith("o/index/model.safetensors.index.json is not valid JSON")


@pytest.mark.parametrize("reference", ["owner/folder", "owner/gguf/sub/model.gguf"])
def test_who_ignores_ranges_does_not_send_a_whole_model(server, reference):
    server.stranger = lambda command, path: (
        (200, {"Accept-Ranges": "none", "Content-Length": str(1 << 40)}, bytes(1 << 20))
        if path.endswith((".safetensors", ".gguf"))
        else None
    )
    error = refusal(reference, DownloadError)
    assert "was answered by 200, not by a part of it" in str(error)
    assert "HTTPS_PROXY" in error.hint


def test_a_page_in_place_of_a_file(server):
    server.stranger = lambda command, path: (
        (200, {"Content-Type": "text/html"}, PAGE) if path.endswith("/config.json") else None
    )
    assert "config.json of owner/folder came with" in str(refusal("owner/folder", DownloadError))


def test_a_file_of_another_size_than_listed(server):
    server.sizes["model.safetensors"] = 100
    error = refusal("owner/folder", DownloadError)
    assert f"has {len(HEAVY):,} bytes, not 100" in str(error)


def test_another_part_than_was_asked_for(server):
    server.stranger = lambda command, path: (
        (206, {"Content-Range": f"bytes 5-9/{len(HEAVY)}"}, b"later")
        if path.endswith(".safetensors")
        else None
    )
    assert "came with other bytes than 0 to" in str(refusal("owner/folder", DownloadError))


def test_a_size_that_no_disk_has(server):
    huge = (1 << 62) + 8
    header = json.dumps({"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}).encode()
    raw = struct.pack("<Q", len(header)) + header
    server.sizes["model.safetensors"] = huge
    server.stranger = lambda command, path: (
        (206, {"Content-Range": f"bytes 0-{len(raw) - 1}/{huge}"}, raw)
        if path.endswith(".safetensors")
        else None
    )
    refusal("owner/folder", DownloadError)


@pytest.mark.slow
def test_a_request_that_fails_for_a_moment_is_repeated(server):
    failed = []

    def stranger(command, path):
        if path.endswith(".safetensors") and not failed:
            failed.append(path)
            return 503, {}, b""
        return None

    server.stranger = stranger
    with headers_of("owner/folder") as files:
        assert_hollow(files.path / "model.safetensors", HEAVY, 100)
    assert failed
