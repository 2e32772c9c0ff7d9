"""Downloads through the real huggingface-hub client, from a small Hub on the loopback."""

import errno
import fnmatch
import hashlib
import http.server
import json
import pathlib
import shutil
import threading

import huggingface_hub
import huggingface_hub.constants
import pytest

from edgekv.errors import DownloadError, ModelNotFound, UnsupportedModel
from edgekv.models import hub
from edgekv.models.hub import resolve

SHA = "b" * 40
WEIGHTS = bytes(range(256)) * 400
REPOS = {
    "owner/folder": {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "tokenizer.json": b"[]",
        "README.md": b"no part of the model",
        "onnx/model.onnx": b"nor is this",
        "original/config.json": b"nor this",
        "pytorch_model.bin": b"nor this",
    },
    "owner/ggufs": {"q4.gguf": WEIGHTS, "sub/q8.gguf": WEIGHTS, "README.md": b""},
    "owner/torch": {"config.json": b"{}", "pytorch_model.bin": b""},
}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].lstrip("/")
        parts = path.removeprefix("api/models/").split("/")
        repo = "/".join(parts[:2])
        if repo == "owner/gated" and "resolve" not in parts:
            files = {"config.json": b"{}", "model.safetensors": b""}
        elif repo == "owner/gated":
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"}, with_body)
        elif repo not in REPOS:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
        else:
            files = REPOS[repo]
        if path.startswith("api/") and "tree" in parts:
            body = [
                {"type": "file", "path": name, "size": len(raw), "oid": hash_of(raw)}
                for name, raw in files.items()
            ]
            return self.send(200, json.dumps(body).encode(), {}, with_body)
        if path.startswith("api/"):
            siblings = [{"rfilename": name, "size": len(raw)} for name, raw in files.items()]
            body = {"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings}
            body |= {"private": False, "gated": False, "disabled": False, "tags": []}
            return self.send(200, json.dumps(body).encode(), {}, with_body)
        raw = files["/".join(parts[4:])]
        headers = {"ETag": f'"{hash_of(raw)}"', "X-Repo-Commit": SHA}
        return self.send(200, raw, headers, with_body)

    def send(self, status, body, headers, with_body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def hash_of(raw: bytes) -> str:
    return hashlib.sha1(raw).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    constants = huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def names_below(folder: pathlib.Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_folder_is_downloaded_with_progress_and_then_kept(server):
    seen = []
    path = resolve("owner/folder", progress=lambda *report: seen.append(report))
    assert names_below(path) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert seen[-1][0] == "owner/folder"
    assert max(done for _, done, _ in seen) == len(WEIGHTS) + 4
    assert all(total is None or done <= total for _, done, total in seen)
    server.requests.clear()
    assert resolve("owner/folder") == path
    assert resolve("owner/folder", offline=True) == path
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
    ],
)
def test_what_cannot_be_had_is_a_typed_error(server, reference, kind, message, hint):
    with pytest.raises(kind, match=message) as caught:
        resolve(reference)
    assert hint in caught.value.hint


def test_no_network(server, monkeypatch):
    # A port that was just closed refuses connections.
    closed = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    closed.server_close()
    endpoint = f"http://127.0.0.1:{closed.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(DownloadError, match="is not on this machine and cannot be") as caught:
        resolve("owner/folder")
    assert "network" in caught.value.hint


def test_too_little_space_is_said_before_the_download(server, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"needs 102,404 bytes in .*1,000 are free"):
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
    download = huggingface_hub.snapshot_download

    def broken(*args, local_files_only=False, **options):
        if local_files_only:
            return download(*args, local_files_only=True, **options)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(DownloadError, match=message) as caught:
        resolve("owner/folder")
    assert caught.value.__cause__ is error


def test_patterns_take_the_model_and_no_copies_of_it():
    def taken(name):
        return any(fnmatch.fnmatchcase(name, p) for p in hub.FOLDER_PATTERNS)

    assert taken("model-00001-of-00002.safetensors")
    assert taken("tokenizer.model")
    assert not taken("original/model.safetensors")
    assert not taken("consolidated.safetensors")
    assert not taken("model.fp32.safetensors")
