"""What people write for a model on the Hugging Face Hub, read as one value. Pure.

owner/name                owner/name/           owner/name/sub/file.gguf
owner/name@revision       owner/name/file.gguf@revision, owner/name@revision/file.gguf
https://huggingface.co/owner/name, hf.co/owner/name, hf://owner/name, and below these
tree/REVISION, blob/REVISION/file, resolve/REVISION/file, commit/REVISION
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote

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
        alone = self.file is None and self.revision is None
        return "".join(
            (
                "hf.co/" if alone and is_gguf(self.repo) else "",  # it would be a path
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
    owner, *more = text.rstrip("/").split("/", 2)
    if not more or (len(more) == 1 and "@" not in more[0] and is_gguf(more[0])):
        return None
    (name, at, revision), file = more[0].partition("@"), "".join(more[1:])
    if at:
        revision, file = _split_revision("/".join((revision, *more[1:])))
    else:
        before, _, after = file.rpartition("@")
        if is_gguf(before):
            at, file, revision = "@", before, after
    if file and not is_gguf(file):
        return None
    return _checked([owner, name], revision if at else None, file.split("/") if file else [])


def _split_revision(text: str) -> tuple[str, str]:
    """What follows an @: a revision, and perhaps a GGUF file; both may have slashes."""
    if not is_gguf(text):
        return text, ""
    if (match := _PULL_REQUEST.match(text)) is not None:
        return match[0], text[match.end() + 1 :]
    revision, _, file = text.partition("/")
    return revision, file


def _below_the_hub(text: str) -> str | None:
    """The path of an address of the Hub or of its mirror; None if it is something else."""
    scheme, has_scheme, rest = text.partition("://")
    if not has_scheme:
        host, slash, path = text.partition("/")
        return path if slash and host.lower() in _HOSTS else None
    if scheme.lower() == "hf":
        return rest
    mirror = os.environ.get(_ENDPOINT_ENV, "").partition("://")[2].partition("/")[0].lower()
    host, _, path = rest.partition("/")
    is_known = host.lower() in (*_HOSTS, mirror or None)
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
    if revision is not None and (not _REVISION.fullmatch(revision) or is_gguf(revision)):
        return None
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in file):
        return None
    at = None if revision == MAIN_BRANCH else revision
    return RepoReference(repo="/".join(repo), revision=at, file="/".join(file) or None)
