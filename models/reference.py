"""What people write for a model on the Hugging Face Hub, read as one value. Pure.

owner/name                owner/name/           owner/name/sub/file.gguf
owner/name@revision       owner/name/file.gguf@revision, owner/name@revision/file.gguf
https://huggingface.co/owner/name, hf.co/owner/name, hf://owner/name, and below these
tree/REVISION, blob/REVISION/file, resolve/REVISION/file, commit/REVISION
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

GGUF_SUFFIX = ".gguf"
MAIN_BRANCH = "main"
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_ENDPOINT_ENV = "HF_ENDPOINT"  # a mirror, as huggingface-hub is told
_VIEWS = ("tree", "blob", "resolve", "raw", "commit")  # what follows a repository in an address

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")  # of owner and name
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-]*(/[A-Za-z0-9_][A-Za-z0-9_.+\-]*)*")
_PULL_REQUEST = re.compile(r"refs/pr/\d+")
_FILE_OF_A_FOLDER = re.compile(r"[^/]+\.(safetensors|json|model|jinja|md)")


@dataclass(frozen=True, kw_only=True)
class RepoReference:
    """A repository of the Hub, perhaps at a branch, tag or commit, perhaps one GGUF file in it."""

    repo: str  # owner/name
    revision: str | None = None  # None is the main branch
    file: str | None = None  # None is the whole folder

    def __str__(self) -> str:
        """As a person writes it, and `parse_reference` reads it."""
        return "".join(
            (
                self.repo,
                f"/{self.file}" if self.file else "",
                f"@{self.revision}" if self.revision else "",
            )
        )


def is_gguf(name: str) -> bool:
    """Whether a file's name says that it is GGUF."""
    return name.lower().endswith(GGUF_SUFFIX)


def parse_reference(text: str) -> RepoReference | None:
    """The repository that is meant; None where it is none, `m/x.gguf` for example: a path."""
    text = text.strip()
    path = _below_the_hub(text)
    if path is not None:
        return _parse_address(path)
    head, at, tail = text.rstrip("/").partition("@")
    parts = head.split("/")
    file, revision = parts[2:], tail
    if at and not file and is_gguf(tail) and "/" in tail:
        revision, _, rest = tail.partition("/")
        if (match := _PULL_REQUEST.match(tail)) is not None:
            revision, rest = match[0], tail[match.end() + 1 :]
        file = rest.split("/")
    if len(parts) == 2 and not at and is_gguf(parts[1]):
        return None
    if file and not is_gguf(file[-1]):
        return None
    return _checked(parts[:2], revision if at else None, file)


def _below_the_hub(text: str) -> str | None:
    """The path of an address of the Hub or of its mirror; None if it is something else."""
    scheme, has_scheme, rest = text.partition("://")
    if not has_scheme:
        host, slash, path = text.partition("/")
        return path if slash and host.lower() in _HOSTS else None
    if scheme.lower() == "hf":
        return rest
    mirror = urlsplit(os.environ.get(_ENDPOINT_ENV, "")).netloc.lower()
    host, _, path = rest.partition("/")
    is_known = host.lower() in (*_HOSTS, mirror)
    return path if scheme.lower() in ("http", "https") and is_known else None


def _parse_address(path: str) -> RepoReference | None:
    path = re.split(r"[?#]", path, maxsplit=1)[0]
    parts = [unquote(part) for part in path.split("/") if part]
    if parts[:1] == ["models"] and len(parts) > 2 and parts[2] not in _VIEWS:
        parts = parts[1:]
    if len(parts) < 2 or parts[0] in ("datasets", "spaces", "api"):
        return None
    owner, (name, at, revision) = parts[0], parts[1].partition("@")
    rest = parts[2:]
    if rest and rest[0] in _VIEWS and len(rest) > 1 and not at:
        at, rest = "@", rest[1:]
        length = 3 if _PULL_REQUEST.fullmatch("/".join(rest[:3])) else 1
        revision, rest = "/".join(rest[:length]), rest[length:]
    if len(rest) == 1 and _FILE_OF_A_FOLDER.fullmatch(rest[0]):
        rest = []  # who names a file of a folder means the model
    if rest and not is_gguf(rest[-1]):
        return None
    return _checked([owner, name], revision if at else None, rest)


def _checked(repo: list[str], revision: str | None, file: list[str]) -> RepoReference | None:
    if len(repo) != 2 or not all(_PART.fullmatch(part) for part in repo):
        return None
    if revision is not None and not _REVISION.fullmatch(revision):
        return None
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in file):
        return None
    at = None if revision == MAIN_BRANCH else revision
    return RepoReference(repo="/".join(repo), revision=at, file="/".join(file) or None)
