"""Finds a model, a file or a folder on this machine, by what a person calls it.

What is on the Hugging Face Hub comes through huggingface-hub: its cache, tokens and settings hold.
A complete snapshot in the cache is used as it is, without a word to the network: a model that
answered yesterday answers on a plane, and nobody learns when it is used.
"""

import contextlib
import difflib
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

from edgekv.config import user_path
from edgekv.errors import ConfigError, DownloadError, ModelNotFound
from edgekv.models.cache import Progress, ignore_progress, models_dir
from edgekv.models.default_model import REGISTRY, fetch
from edgekv.models.folder_files import CONFIG_FILE
from edgekv.models.hollow_copy import ModelFiles, hollow_copy
from edgekv.models.reference import MAIN_BRANCH, RepoReference, is_gguf, parse_reference
from edgekv.models.repository import fetch_repository, renew_repository
from edgekv.models.snapshot import Snapshot, find_snapshot

__all__ = ["ModelEntry", "Progress", "headers_of", "list_models", "renew", "resolve"]

REFERENCE_CHARS_MAX = 4096
_NUM_NAMED_MAX = 20  # files in a hint
_FORMS = (
    "a model is a known name, a .gguf file, a folder with config.json and safetensors, "
    "or owner/name on Hugging Face"
)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model that can be opened by its name, which is what `resolve` takes."""

    name: str
    source: Literal["registry", "huggingface"]
    path: pathlib.Path | None  # the file or folder; None before it is downloaded completely
    size_bytes: int  # on disk, or what the download will leave there
    missing: tuple[str, ...] = ()  # what a download that broke off has not brought yet

    @property
    def downloaded(self) -> bool:
        """Whether it can be opened without the network."""
        return self.path is not None


def resolve(
    reference: str, *, progress: Progress | None = None, offline: bool = False
) -> pathlib.Path:
    """Find a model and download it where it is not here yet, or not all of it.

    Args:
        reference: A name of the registry ("smollm2-135m"); a path to a .gguf file or to a folder
            with config.json and safetensors; a repository on Hugging Face, or a GGUF file in one,
            in the ways that `edgekv.models.reference` lists. What is in its cache is used as it
            is; `renew` asks whether there is anything newer.
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
    found = _local(reference) or _repository(reference)
    if isinstance(found, pathlib.Path):
        return found
    try:
        return fetch_repository(found, progress=progress, offline=offline)
    except DownloadError as error:
        if not _has_parent(reference):
            raise
        raise DownloadError(
            f"{reference} is no folder here, and {error}", hint=error.hint
        ) from error


def renew(reference: str, *, progress: Progress | None = None, force: bool = False) -> pathlib.Path:
    """`resolve` that looks again: what is missing, damaged or newer on the Hub is fetched.

    Args:
        reference: See `resolve`; what is in a folder of the user's own stays as it is.
        progress: See `resolve`.
        force: Fetch all of it again, whatever is here.

    Raises:
        ConfigError: With `force`, a path: edgekv did not fetch that.
        ModelNotFound, DownloadError, UnsupportedModel: See `resolve`.
    """
    progress = progress or ignore_progress
    if reference in REGISTRY:
        return fetch(REGISTRY[reference], progress=progress, renew=True, force=force)
    found = _local(reference) or _repository(reference)
    if isinstance(found, RepoReference):
        return renew_repository(found, progress=progress, force=force)
    if force:
        raise ConfigError(
            f"{found} is a file or folder of yours, which edgekv did not fetch",
            hint="copy it anew from where it came, or name the model as on Hugging Face",
        )
    return found


@contextlib.contextmanager
def headers_of(reference: str, *, offline: bool = False) -> Iterator[ModelFiles]:
    """Find a model's headers and configuration for as long as the block runs; see `resolve`.

    What is in the cache is used as it is. Of a repository that is not, or not all of it, nothing
    else is fetched, and nothing is kept.

    Raises:
        ModelNotFound, DownloadError: It cannot be had.
        UnsupportedModel, CheckpointCorrupt, TokenizerError: See `hollow_copy`.
    """
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    found = None if reference in REGISTRY else _local(reference) or _repository(reference)
    if isinstance(found, RepoReference):
        snapshot = find_snapshot(found.repo, found.revision)
        is_whole = snapshot is not None and not snapshot.lacks(found.file)
        if not is_whole and not offline:
            with hollow_copy(found) as copy:
                yield copy
            return
    yield ModelFiles(resolve(reference, offline=True))


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
        raise ModelNotFound(
            f"folder {path} has no {CONFIG_FILE}",
            hint=_models_in(path, "name one of its models: ") or _FORMS,
        )
    if path.is_file() and is_gguf(path.name):
        return path
    hint = f"name its folder: {path.parent}" if (path.parent / CONFIG_FILE).is_file() else _FORMS
    raise ModelNotFound(f"{path} is neither a .gguf file nor a folder", hint=hint)


def _models_in(folder: pathlib.Path, before: str) -> str:
    """A hint with the models in a folder; empty if there is none."""
    try:
        found = sorted(
            str(path)
            for path in folder.iterdir()
            if is_gguf(path.name) or (path / CONFIG_FILE).is_file()
        )
    except (OSError, ValueError):  # ValueError: a null byte
        return ""
    more = ", …" if len(found) > _NUM_NAMED_MAX else ""
    return before + ", ".join(found[:_NUM_NAMED_MAX]) + more if found else ""


def _repository(reference: str) -> RepoReference:
    """The repository that is meant, or a file in it.

    Raises:
        ModelNotFound: None is. A file in a folder that is here is a path, and not there.
    """
    wanted = parse_reference(reference[:REFERENCE_CHARS_MAX])
    if wanted is None or (wanted.file and wanted.revision is None and _has_parent(reference)):
        _fail_unknown(reference)
    return wanted


def _has_parent(reference: str) -> bool:
    parent = pathlib.Path(reference).parent
    return "://" not in reference and parent.is_dir()


def _fail_unknown(reference: str) -> NoReturn:
    shown = reference if len(reference) <= 100 else reference[:100] + "…"
    if reference.startswith((".", "/", "~")) or is_gguf(reference):
        beside = _models_in(user_path(reference).parent, "there are ")
        raise ModelNotFound(f"{shown!r}: no such file or folder", hint=beside or _FORMS)
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
    entries = []
    for name, known in REGISTRY.items():
        path = models_dir() / known.file_name
        # By size alone: a listing must not hash gigabytes, and `fetch` verifies before use.
        here = path.is_file() and path.stat().st_size == known.size_bytes
        at = path if here else None
        entries.append(
            ModelEntry(name=name, source="registry", path=at, size_bytes=known.size_bytes)
        )
    return [*entries, *_cached_models()]


def _cached_models() -> Iterable[ModelEntry]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError):  # none, or a file in its place
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id.lower()):
        if repo.repo_type != "model":
            continue
        for revision in sorted(repo.revisions, key=lambda one: one.last_modified, reverse=True):
            root = revision.snapshot_path
            sizes = {
                f.file_path.relative_to(root).as_posix(): f.size_on_disk for f in revision.files
            }
            at = None if MAIN_BRANCH in revision.refs else min(revision.refs, default=root.name)
            yield from _of_revision(RepoReference(repo=repo.repo_id, revision=at), root, sizes)


def _of_revision(
    found: RepoReference, root: pathlib.Path, sizes: dict[str, int]
) -> Iterable[ModelEntry]:
    """What can be opened in one snapshot: the folder, and each GGUF file."""
    if CONFIG_FILE in sizes and any(name.endswith(".safetensors") for name in sizes):
        missing = tuple(Snapshot(root).lacks(None))
        yield ModelEntry(
            name=str(found),
            source="huggingface",
            path=None if missing else root,
            size_bytes=sum(sizes.values()),
            missing=missing,
        )
    for name in filter(is_gguf, sorted(sizes)):
        yield ModelEntry(
            name=str(replace(found, file=name)),
            source="huggingface",
            path=root / name,
            size_bytes=sizes[name],
        )
