"""Finds a model, a file or a folder on this machine, by what a person calls it."""

import difflib
import pathlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn

from edgekv.config import user_path
from edgekv.errors import ModelNotFound
from edgekv.models.cache import Progress, ignore_progress, models_dir
from edgekv.models.default_model import REGISTRY, fetch
from edgekv.models.folder_files import CONFIG_FILE
from edgekv.models.hf_download import fetch_repo

__all__ = ["ModelEntry", "Progress", "list_models", "resolve"]

REFERENCE_CHARS_MAX = 4096
_FORMS = (
    "a model is a known name, a .gguf file, a folder with config.json and safetensors, "
    "or owner/name on Hugging Face"
)
# owner/name, and perhaps a GGUF file inside: the Hub's alphabet, no part that is "." or "..".
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_REPO = re.compile(rf"({_PART}/{_PART})(?:/((?:{_PART}/)*{_PART}\.gguf))?")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model that can be opened by its name, which is what `resolve` takes."""

    name: str
    source: Literal["registry", "huggingface"]
    path: pathlib.Path | None  # the file or folder; None before it is downloaded
    size_bytes: int  # on disk, or what the download will leave there

    @property
    def downloaded(self) -> bool:
        """Whether it can be opened without the network."""
        return self.path is not None


def resolve(
    reference: str, *, progress: Progress | None = None, offline: bool = False
) -> pathlib.Path:
    """Find a model and download it where it is not here yet.

    Args:
        reference: A name of the registry ("smollm2-135m"); a path to a .gguf file or to a folder
            with config.json and safetensors; "owner/name" or "owner/name/file.gguf" on Hugging
            Face. What is in its cache is used as it is; `hf download owner/name` renews it.
        progress: Told how far a download is, perhaps from a worker thread.
        offline: Never use the network.

    Returns:
        A .gguf file or a folder.

    Raises:
        ModelNotFound: Nothing has this name; the hint has names that are near.
        DownloadError: The network, the index or the disk did not deliver.
        UnsupportedModel: A repository without safetensors.
    """
    progress = progress or ignore_progress
    if reference in REGISTRY:
        return fetch(REGISTRY[reference], progress=progress, offline=offline)
    local = _local(reference)
    if local is not None:
        return local
    match = _REPO.fullmatch(reference)
    if match is None:
        _fail_unknown(reference)
    return fetch_repo(match[1], match[2], progress=progress, offline=offline)


def _local(reference: str) -> pathlib.Path | None:
    """The file or folder at this path; None if nothing is there.

    Raises:
        ModelNotFound: Something is there that is no model.
    """
    try:
        path = user_path(reference[:REFERENCE_CHARS_MAX])
        if not reference.strip() or not path.exists():
            return None
    except (OSError, ValueError):  # too long, a null byte
        return None
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            return path
        ggufs = sorted(file.name for file in path.glob("*.gguf"))[:20]
        raise ModelNotFound(
            f"folder {path} has no {CONFIG_FILE}",
            hint="name one of its GGUF files: " + ", ".join(ggufs) if ggufs else _FORMS,
        )
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    raise ModelNotFound(f"{path} is neither a .gguf file nor a folder", hint=_FORMS)


def _fail_unknown(reference: str) -> NoReturn:
    shown = reference if len(reference) <= 100 else reference[:100] + "…"
    if reference.startswith((".", "/", "~")) or reference.endswith(".gguf"):
        raise ModelNotFound(f"{shown!r}: no such file or folder", hint=_FORMS)
    by_key = {}  # a repository is known by its last part too
    for entry in list_models():
        by_key[entry.name.lower()] = entry.name
        by_key[entry.name.lower().rpartition("/")[2]] = entry.name
    keys = difflib.get_close_matches(reference[:200].lower(), list(by_key), n=3, cutoff=0.5)
    near = dict.fromkeys(by_key[key] for key in keys)
    hint = f"did you mean {' or '.join(near)}? " if near else f"known: {', '.join(REGISTRY)}; "
    raise ModelNotFound(f"no model is called {shown!r}", hint=hint + _FORMS)


def list_models() -> list[ModelEntry]:
    """Models that can be opened by name: the registry's, then what Hugging Face's cache holds."""
    return [*_registry_entries(), *_huggingface_entries()]


def _registry_entries() -> Iterable[ModelEntry]:
    for name, known in REGISTRY.items():
        path = models_dir() / known.file_name
        # By size alone: a listing must not hash gigabytes, and `fetch` verifies before use.
        here = path.is_file() and path.stat().st_size == known.size_bytes
        yield ModelEntry(
            name=name,
            source="registry",
            path=path if here else None,
            size_bytes=known.size_bytes,
        )


def _huggingface_entries() -> Iterable[ModelEntry]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = sorted(
            scan_cache_dir(constants.HF_HUB_CACHE).repos, key=lambda repo: repo.repo_id.lower()
        )
    except CacheNotFound:
        return
    for repo in repos:
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda revision: revision.last_modified)
        sizes = {file.file_path: file.size_on_disk for file in newest.files}
        names = {path.relative_to(newest.snapshot_path).as_posix() for path in sizes}
        if CONFIG_FILE in names and any(name.endswith(".safetensors") for name in names):
            yield _entry(repo.repo_id, newest.snapshot_path, sum(sizes.values()))
        for path, size in sorted(sizes.items()):
            if path.suffix == ".gguf":
                inside = path.relative_to(newest.snapshot_path).as_posix()
                yield _entry(f"{repo.repo_id}/{inside}", path, size)


def _entry(name: str, path: pathlib.Path, size_bytes: int) -> ModelEntry:
    return ModelEntry(name=name, source="huggingface", path=path, size_bytes=size_bytes)
