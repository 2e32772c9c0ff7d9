"""A small Hugging Face Hub on the loopback: what of its API huggingface-hub uses to download."""

import hashlib
import http.server
import json
import pathlib
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

import huggingface_hub.constants
import pytest

PAGE = b"<!DOCTYPE html>\n<html><body>Welcome to our free WLAN! Please log in.</body></html>"


def safetensors(num_bytes: int = 24) -> bytes:
    """A whole file with one tensor."""
    tensor = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    header = json.dumps({"a": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(num_bytes)


def sharded(*shards: str) -> dict[str, bytes]:
    """An index and the files it names."""
    weight_map = {f"t{number}": shard for number, shard in enumerate(shards)}
    index = json.dumps({"weight_map": weight_map}).encode()
    return {"model.safetensors.index.json": index} | {
        shard: safetensors(64 + number) for number, shard in enumerate(shards)
    }


TOKENIZER = {"tokenizer.json": b"[]", "tokenizer_config.json": b'{"bos_token": "a"}'}
MODEL = {"config.json": b"{}", "model.safetensors": safetensors(100_000)} | TOKENIZER


@dataclass
class FakeRepo:
    """A repository: files of each commit, and the commits of its branches and tags."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]

    @classmethod
    def of(cls, files: dict[str, bytes], sha: str = "b" * 40) -> "FakeRepo":
        """One commit, which is the main branch."""
        return cls({sha: files}, {"main": sha})


@dataclass
class FakeHub:
    """The Hub; who answers in its place says `stranger`: (status, headers, body), or None."""

    repos: dict[str, FakeRepo]
    gated: set[str] = field(default_factory=set)
    stranger: Callable[[str, str], tuple[int, dict[str, str], bytes] | None] | None = None
    sizes: dict[str, int] = field(default_factory=dict)  # what it says where that is not so
    requests: list[str] = field(default_factory=list)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)  # that were asked for
    num_bytes_sent: int = 0  # of bodies
    endpoint: str = ""

    def answer(self, command: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if self.stranger is not None and (answer := self.stranger(command, path)) is not None:
            return answer
        parts = [unquote(part) for part in path.partition("?")[0].strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            return self._tell("/".join(parts[2:4]), parts[4:])
        if len(parts) < 5 or parts[2] != "resolve":
            return 404, {}, b""
        return self._send("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _tell(self, repo: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        sha = self._commit(repo, rest[1] if len(rest) > 1 else "main")
        if sha is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        sizes = {name: len(raw) for name, raw in self.repos[repo].commits[sha].items()} | self.sizes
        files = {name: sizes[name] for name in self.repos[repo].commits[sha]}
        body: object = [
            {"type": "file", "path": name, "size": size, "oid": hash_of(name.encode())}
            for name, size in files.items()
        ]
        if rest[:1] != ["tree"]:
            siblings = [{"rfilename": name, "size": size} for name, size in files.items()]
            body = {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings}
            body |= {"private": False, "gated": False, "disabled": False, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()

    def _commit(self, repo: str, revision: str) -> str | None:
        found = self.repos[repo]
        sha = found.refs.get(revision, revision)
        return sha if sha in found.commits else None

    def _send(self, repo: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        sha = self._commit(repo, revision) if repo in self.repos else None
        if sha is None or name not in self.repos[repo].commits[sha]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        raw = self.repos[repo].commits[sha][name]
        return 200, {"ETag": f'"{hash_of(raw)}"', "X-Repo-Commit": sha}, raw


Answer = tuple[int, dict[str, str], bytes]


def part_of(answer: Answer, path: str, asked: str, seen: list[tuple[str, int, int]]) -> Answer:
    """What a server that knows ranges makes of a whole answer; `asked` is the Range header."""
    status, headers, raw = answer
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
    if status != 200 or match is None:
        return answer
    start, end = int(match[1]), min(int(match[2]) + 1, len(raw))
    seen.append((path.rpartition("/")[2], start, end))
    if start >= len(raw):
        return 416, {"Content-Range": f"bytes */{len(raw)}"}, b""
    headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(raw)}"}
    return 206, headers, raw[start:end]


def hash_of(raw: bytes) -> str:
    return hashlib.sha1(raw).hexdigest()


@contextmanager
def in_place_of_the_hub(
    hub: FakeHub, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """Serve, and let huggingface-hub ask nobody else and keep what comes in `cache`."""
    with serving(hub):
        constants = huggingface_hub.constants
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve at `hub.endpoint` while the block runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            answer = hub.answer(self.command, self.path)
            if "Range" in self.headers and "Accept-Ranges" not in answer[1]:
                answer = part_of(answer, self.path, self.headers["Range"], hub.ranges)
            status, headers, body = answer
            hub.num_bytes_sent += len(body) if self.command == "GET" else 0
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
