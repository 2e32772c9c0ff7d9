"""Downloads through the real huggingface-hub client, from a small Hub on the loopback."""

import errno
import pathlib
import shutil

import huggingface_hub
import huggingface_hub.constants
import pytest
from fake_hub import (
    MODEL,
    PAGE,
    TOKENIZER,
    FakeHub,
    FakeRepo,
    in_place_of_the_hub,
    safetensors,
    serving,
    sharded,
)

from edgekv.errors import CheckpointCorrupt, DownloadError, ModelNotFound, UnsupportedModel
from edgekv.models import gguf_file
from edgekv.models.folder_files import find_shards, read_json
from edgekv.models.hub import list_models, renew, resolve
from edgekv.models.safetensors_file import read_header

OLD, NEW = "a" * 40, "c" * 40
WEIGHTS = MODEL["model.safetensors"]
REPOS = {
    "owner/folder": MODEL
    | {
        "README.md": b"no part of the model",
        "onnx/model.onnx": b"nor is this",
        "original/config.json": b"nor this",
        "consolidated.safetensors": b"nor this",
        "model.fp32.safetensors": b"nor this",
        "pytorch_model.bin": b"nor this",
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
    },
    "owner/ggufs": {"q4.gguf": WEIGHTS, "sub/q8.gguf": WEIGHTS, "README.md": b""},
    "owner/torch": {"config.json": b"{}", "pytorch_model.bin": b""},
    "owner/gated": MODEL,
    "owner/no-tokenizer": {"config.json": b"{}", "model.safetensors": WEIGHTS},
}
HERE = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    repos = {name: FakeRepo.of(files) for name, files in REPOS.items()}
    repos["owner/moved"] = FakeRepo(
        {OLD: MODEL, NEW: MODEL | {"config.json": b'{"new": 1}'}}, {"main": NEW, "v1": OLD}
    )
    hub = FakeHub(repos, gated={"owner/gated"})
    with in_place_of_the_hub(hub, tmp_path / "hf", monkeypatch):
        yield hub


def names_below(folder: pathlib.Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_folder_is_downloaded_with_progress_and_then_kept(server):
    seen = []
    path = resolve("owner/folder", progress=lambda *report: seen.append(report))
    assert names_below(path) == HERE | {"additional_chat_templates/tools.jinja"}
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert seen[-1][0] == "owner/folder"
    assert max(done for _, done, _ in seen) == sum(p.stat().st_size for p in path.rglob("*.*"))
    assert all(total is None or done <= total for _, done, total in seen)
    server.requests.clear()
    assert resolve("owner/folder") == path
    assert resolve("https://huggingface.co/owner/folder/tree/main", offline=True) == path
    assert server.requests == []


@pytest.mark.slow
def test_one_gguf_file_is_downloaded(server):
    path = resolve("owner/ggufs/sub/q8.gguf")
    assert path.read_bytes() == WEIGHTS
    assert names_below(path.parent.parent) == {"sub/q8.gguf"}
    assert resolve("owner/ggufs/sub/q8.gguf", offline=True) == path


@pytest.mark.parametrize(
    ("reference", "kind", "message", "hint"),
    [
        ("owner/nothing", ModelNotFound, "no such model on Hugging Face", "spelling"),
        ("owner/gated", DownloadError, "is gated", "HF_TOKEN"),
        ("owner/ggufs", UnsupportedModel, "no config.json", "owner/ggufs/q4.gguf"),
        ("owner/torch", UnsupportedModel, "no config.json", "safetensors"),
        ("owner/ggufs/q5.gguf", ModelNotFound, "no file q5.gguf", "sub/q8.gguf"),
        ("owner/na--me", ModelNotFound, "no such model", "spelling"),
        ("owner/folder@v9", ModelNotFound, "no revision v9", "branches and tags"),
    ],
)
def test_what_cannot_be_had_is_a_typed_error(server, reference, kind, message, hint):
    with pytest.raises(kind, match=message) as caught:
        resolve(reference)
    assert hint in caught.value.hint


# --- revisions ---


@pytest.mark.slow
def test_a_revision_is_had_and_found_again_without_the_network(server):
    new = resolve("owner/moved")
    old = resolve("owner/moved@v1")
    assert (new.name, old.name) == (NEW, OLD)
    assert resolve("owner/moved", offline=True) == new
    assert resolve("hf.co/owner/moved/tree/v1", offline=True) == old
    assert resolve(f"owner/moved@{OLD}", offline=True) == old
    with pytest.raises(DownloadError, match="owner/moved@v2 is not downloaded"):
        resolve("owner/moved@v2", offline=True)
    named = [entry.name for entry in list_models() if entry.source == "huggingface"]
    assert sorted(named) == ["owner/moved", "owner/moved@v1"]
    assert {resolve(name, offline=True) for name in named} == {new, old}


@pytest.mark.slow
def test_pull_takes_what_is_newer_and_resolve_does_not(server):
    server.repos["owner/moved"].refs["main"] = OLD
    assert resolve("owner/moved").name == OLD
    server.repos["owner/moved"].refs["main"] = NEW
    assert resolve("owner/moved").name == OLD
    assert renew("owner/moved").name == NEW
    assert resolve("owner/moved", offline=True).name == NEW


# --- caches that somebody filled file by file ---


def have(names, repo="owner/folder"):
    """What somebody fetched of a repository, one file at a time."""
    for name in names:
        path = huggingface_hub.hf_hub_download(repo, name)
    return pathlib.Path(path).parent


@pytest.mark.slow
@pytest.mark.parametrize("there", [["config.json"], ["config.json", "model.safetensors"]])
def test_what_is_missing_is_named_offline_and_fetched_online(server, there):
    folder = have(there)
    with pytest.raises(DownloadError, match=r"tokenizer\.json of owner/folder missing or damaged"):
        resolve("owner/folder", offline=True)
    (entry,) = [one for one in list_models() if one.name == "owner/folder"] or [None]
    if entry is not None:
        assert (entry.downloaded, entry.path) == (False, None)
        assert "tokenizer.json" in entry.missing
    assert resolve("owner/folder") == folder
    assert names_below(folder) >= HERE


@pytest.mark.slow
def test_a_template_that_nobody_fetched_is_fetched(server):
    folder = have(["config.json", "model.safetensors", "tokenizer.json"])
    assert resolve("owner/folder") == folder
    assert names_below(folder) >= HERE
    server.requests.clear()
    assert resolve("owner/folder") == folder
    assert server.requests == [], "what the repository does not have is asked for once"


@pytest.mark.slow
def test_without_the_hub_a_template_that_may_be_missing_is_said(server, caplog):
    folder = have(["config.json", "model.safetensors", "tokenizer.json"])
    (repo,) = [server.repos.pop("owner/folder")]
    assert resolve("owner/folder") == folder, "a repository that is gone"
    server.repos["owner/folder"] = repo
    server.stranger = lambda *request: (200, {"Content-Type": "text/html"}, PAGE)
    assert resolve("owner/folder") == folder
    assert resolve("owner/folder", offline=True) == folder
    for record in caplog.records:
        assert "tokenizer_config.json" in record.getMessage()
    assert len(caplog.records) == 3


@pytest.mark.slow
def test_a_repository_without_a_tokenizer_is_whole_without_one(server):
    folder = resolve("owner/no-tokenizer")
    server.requests.clear()
    assert resolve("owner/no-tokenizer") == resolve("owner/no-tokenizer", offline=True) == folder
    assert server.requests == []


@pytest.mark.slow
def test_what_is_missing_comes_from_the_commit_that_is_there(server):
    server.repos["owner/moved"].refs["main"] = OLD
    folder = have(["config.json"], "owner/moved")
    server.repos["owner/moved"].refs["main"] = NEW
    assert resolve("owner/moved") == folder
    assert folder.name == OLD


@pytest.mark.slow
def test_a_commit_that_is_gone_is_said_with_what_helps(server):
    server.repos["owner/moved"].refs["main"] = OLD
    have(["config.json"], "owner/moved")
    server.repos["owner/moved"].refs["main"] = NEW
    del server.repos["owner/moved"].commits[OLD]
    with pytest.raises(DownloadError, match="missing or damaged, and owner/moved has no") as caught:
        resolve("owner/moved")
    assert caught.value.hint == "edgekv pull owner/moved takes the newest"
    assert renew("owner/moved").name == NEW


# --- weights ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (sharded("model-1.safetensors", "model-2.safetensors"), ["model-1", "model-2"]),
        (
            sharded("model.safetensors-00001-of-00001.safetensors"),
            ["model.safetensors-00001-of-00001"],
        ),
        (sharded("parts/one.safetensors", "two.safetensors"), ["parts/one", "two"]),
        (sharded("a.safetensors") | {"model.safetensors": b"stray"}, ["a"]),
        (
            {f"model-0000{n}-of-00002.safetensors": safetensors() for n in (1, 2)},
            ["model-00001-of-00002", "model-00002-of-00002"],
        ),
    ],
)
def test_shards_have_the_names_that_the_index_says(server, weights, expected):
    files = {"config.json": b"{}"} | TOKENIZER | weights
    server.repos["owner/shards"] = FakeRepo.of(files)
    folder = resolve("owner/shards")
    assert [str(p.relative_to(folder))[: -len(".safetensors")] for p in find_shards(folder)] == (
        expected
    )
    server.requests.clear()
    assert resolve("owner/shards") == folder
    assert server.requests == []


@pytest.mark.slow
def test_a_repository_that_lacks_what_its_index_names_is_said(server):
    files = {"config.json": b"{}"} | sharded("a.safetensors", "b.safetensors")
    del files["b.safetensors"]
    server.repos["owner/broken"] = FakeRepo.of(files)
    with pytest.raises(UnsupportedModel, match=r"names b\.safetensors, which it does not have"):
        resolve("owner/broken")


# --- damage ---


def truncate(path: pathlib.Path) -> None:
    with path.resolve().open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.slow
@pytest.mark.parametrize("again", [resolve, renew])
def test_a_truncated_snapshot_is_repaired(server, again):
    folder = resolve("owner/folder")
    truncate(folder / "model.safetensors")
    with pytest.raises(DownloadError, match=r"model\.safetensors of owner/folder missing or"):
        resolve("owner/folder", offline=True)
    server.requests.clear()
    assert again("owner/folder") == folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [r for r in server.requests if "tokenizer.json" in r] == [], "only what was damaged"


@pytest.mark.slow
def test_a_file_of_the_users_own_in_a_snapshot_is_not_removed(server, tmp_path):
    folder = resolve("owner/folder")
    own = tmp_path / "own.safetensors"
    own.write_bytes(WEIGHTS[:100])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(own)
    assert (renew("owner/folder") / "model.safetensors").read_bytes() == WEIGHTS
    assert own.read_bytes() == WEIGHTS[:100]


@pytest.mark.slow
def test_pull_repairs_a_truncated_gguf_file(server):
    path = resolve("owner/ggufs/q4.gguf")
    truncate(path)
    assert renew("owner/ggufs/q4.gguf") == path
    assert path.read_bytes() == WEIGHTS


@pytest.mark.slow
def test_pull_with_force_fetches_all_again(server):
    folder = resolve("owner/folder")
    damaged = folder / "model.safetensors"
    damaged.resolve().write_bytes(safetensors(100_000)[:-1] + b"!")  # as long as it should be
    assert renew("owner/folder") == folder
    assert damaged.read_bytes() != WEIGHTS
    assert renew("owner/folder", force=True) == folder
    assert damaged.read_bytes() == WEIGHTS


# --- the network ---


def test_no_network(server, monkeypatch):
    with serving(FakeHub({})) as closed:
        pass  # a port that was just closed refuses connections
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed.endpoint)
    with pytest.raises(DownloadError, match="owner/folder cannot be downloaded") as caught:
        resolve("owner/folder")
    assert "network" in caught.value.hint
    have_parts = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--owner--folder"
    assert not have_parts.exists()


@pytest.mark.slow
def test_without_the_network_what_is_missing_is_named(server, monkeypatch, tmp_path):
    have(["config.json", "model.safetensors"])
    with serving(FakeHub({})) as closed:
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed.endpoint)
    with pytest.raises(DownloadError, match=r"tokenizer\.json of owner/folder missing.*cannot be"):
        resolve("owner/folder")
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match="owner/mistyped is no folder here, and"):
        resolve("owner/mistyped")


@pytest.mark.slow
def test_pull_without_the_network_keeps_what_is_whole(server, monkeypatch, caplog):
    folder = resolve("owner/folder")
    with serving(FakeHub({})) as closed:
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed.endpoint)
    assert renew("owner/folder") == folder
    assert "could not be compared with the Hub's" in caplog.text
    with pytest.raises(DownloadError):
        renew("owner/folder", force=True)
    truncate(folder / "model.safetensors")
    with pytest.raises(DownloadError):
        renew("owner/folder")


HTML = {"Content-Type": "text/html"}


def everywhere(command, path):
    return 200, HTML, PAGE


def at_files(command, path):
    return None if path.startswith("/api") else (200, HTML, PAGE)


def json_of_something_else(command, path):
    return 200, {"Content-Type": "application/json"}, b'{"error": "who are you?"}'


def a_list(command, path):
    return 200, {"Content-Type": "application/json"}, b"[1]"


@pytest.mark.slow
@pytest.mark.parametrize("stranger", [everywhere, at_files, json_of_something_else, a_list])
@pytest.mark.parametrize("reference", ["owner/folder", "owner/ggufs/q4.gguf"])
def test_who_answers_in_the_hubs_place_is_a_typed_error(server, stranger, reference):
    server.stranger = stranger
    with pytest.raises(DownloadError, match="cannot be downloaded: http://127") as caught:
        resolve(reference)
    assert "login page" in caught.value.hint
    if stranger is everywhere:
        assert "answered with an HTML page" in str(caught.value)
    server.stranger = None
    assert resolve(reference).exists(), "nothing of it is kept"


@pytest.mark.slow
def test_a_page_in_place_of_a_file_is_not_kept(server):
    def stranger(command, path):
        if command == "GET" and path.endswith("/config.json"):
            return 200, HTML | {"Content-Length": "2"}, PAGE[:2]
        return None

    server.stranger = stranger
    server.sizes["config.json"] = 10
    with pytest.raises(DownloadError, match=r"config\.json of owner/folder came with 2 bytes"):
        resolve("owner/folder")
    server.stranger = None
    del server.sizes["config.json"]
    assert (resolve("owner/folder") / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "start", [PAGE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"]
)
def test_what_stands_in_for_a_file_is_named(tmp_path, start):
    path = tmp_path / "file"
    path.write_bytes(start)
    for read in (read_json, read_header, gguf_file.read_header):
        with pytest.raises(CheckpointCorrupt, match="not the file"):
            read(path)


def test_too_little_space_is_said_before_the_download(server, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"needs 100,\d\d\d bytes in .*1,000 are free"):
        resolve("owner/folder")
    assert not any("resolve" in request for request in server.requests)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("transfer broke\noff"), "cannot be downloaded: transfer broke off"),
        (OSError(), "cannot be downloaded: OSError"),
    ],
)
def test_a_transfer_that_breaks_off_is_a_typed_error(server, monkeypatch, error, message):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(DownloadError, match=message) as caught:
        resolve("owner/folder")
    assert caught.value.__cause__ is error
