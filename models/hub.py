"""Finds a model, a file or a folder on this machine, by what a person calls it.

What is on the Hugging Face Hub comes through huggingface-hub: its cache, tokens and settings hold.
A complete snapshot in the cache is used as it is, without a word to the network: a model that
answered yesterday answers on a plane, and nobody learns when it is used.
"""

import difflib
import errno
import pathlib
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NoReturn

from edgekv.config import user_path
from edgekv.errors import CheckpointCorrupt, DownloadError, ModelNotFound, UnsupportedModel
from edgekv.models.cache import Progress, ignore_progress, models_dir
from edgekv.models.default_model import REGISTRY, fetch
from edgekv.models.folder_files import CONFIG_FILE, find_shards

__all__ = ["ModelEntry", "Progress", "list_models", "resolve"]

REFERENCE_CHARS_MAX = 4096
_FORMS = (
    "a model is a known name, a .gguf file, a folder with config.json and safetensors, "
    "or owner/name on Hugging Face"
)
# What a model is made of; `*` also matches "/", so patterns begin with a file's name.
FOLDER_PATTERNS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
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
    return _fetch_repo(match[1], match[2], progress=progress, offline=offline)


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
    entries = []
    for name, known in REGISTRY.items():
        path = models_dir() / known.file_name
        # By size alone: a listing must not hash gigabytes, and `fetch` verifies before use.
        here = path.is_file() and path.stat().st_size == known.size_bytes
        at = path if here else None
        entries.append(
            ModelEntry(name=name, source="registry", path=at, size_bytes=known.size_bytes)
        )
    for name, path, size_bytes in _cached_models():
        entries.append(
            ModelEntry(name=name, source="huggingface", path=path, size_bytes=size_bytes)
        )
    return entries


def _cached_models() -> Iterable[tuple[str, pathlib.Path, int]]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id.lower()):
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda revision: revision.last_modified)
        root = newest.snapshot_path
        sizes = {f.file_path.relative_to(root).as_posix(): f.size_on_disk for f in newest.files}
        if CONFIG_FILE in sizes and any(name.endswith(".safetensors") for name in sizes):
            yield repo.repo_id, root, sum(sizes.values())
        for name in sorted(sizes):
            if name.endswith(".gguf"):
                yield f"{repo.repo_id}/{name}", root / name, sizes[name]


# --- repositories of the Hugging Face Hub ---


def _fetch_repo(repo: str, file: str | None, *, progress: Progress, offline: bool) -> pathlib.Path:
    """The local path of a repository's safetensors model, or of one GGUF file in it."""
    folder = _cached(repo, file)
    if folder is None:
        if offline:
            raise DownloadError(
                f"{repo} is not downloaded completely", hint="run once with the network allowed"
            )
        folder = _download(repo, file, progress)
    return folder if file is None else folder / file


def _patterns(file: str | None) -> list[str]:
    return list(FOLDER_PATTERNS) if file is None else [file]


def _cached(repo: str, file: str | None) -> pathlib.Path | None:
    """The snapshot in the cache, if all that is needed is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = _patterns(file)
        folder = pathlib.Path(
            snapshot_download(repo, allow_patterns=patterns, local_files_only=True)
        )
        if file is None:
            find_shards(folder)
    except (OSError, HFValidationError, CheckpointCorrupt, UnsupportedModel):
        return None
    return folder if (folder / (file or CONFIG_FILE)).is_file() else None


def _download(repo: str, file: str | None, progress: Progress) -> pathlib.Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    # The HTTP library's base error, whichever library this version of huggingface-hub uses.
    http_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        siblings = HfApi().model_info(repo, files_metadata=True).siblings or []
        sizes = {entry.rfilename: entry.size or 0 for entry in siblings}
        _check_listing(repo, file, sizes)
        wanted = [n for n in sizes if any(fnmatchcase(n, pattern) for pattern in _patterns(file))]
        _check_space(repo, sum(sizes[name] for name in wanted))
        folder = snapshot_download(
            repo, allow_patterns=sorted(wanted), tqdm_class=_bar_class(repo, progress)
        )
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        _fail_no_repo(repo, error)
    except (http_error, OSError, RuntimeError) as error:  # RuntimeError: from hf_xet
        _fail_transfer(repo, error)
    return pathlib.Path(folder)


def _check_listing(repo: str, file: str | None, sizes: dict[str, int]) -> None:
    """Whether the repository has what is asked for, before any byte of it is fetched."""
    ggufs = sorted(name for name in sizes if name.endswith(".gguf"))
    if file is not None:
        if file not in sizes:
            raise ModelNotFound(
                f"{repo} has no file {file}",
                hint="its GGUF files: " + (", ".join(ggufs[:20]) or "none"),
            )
        return
    if CONFIG_FILE in sizes and any(name.endswith(".safetensors") for name in sizes):
        return
    raise UnsupportedModel(
        f"{repo} has no config.json with safetensors",
        hint=f"name one of its GGUF files: {repo}/{ggufs[0]}"
        if ggufs
        else "supported: safetensors and GGUF",
    )


def _check_space(repo: str, needed_bytes: int) -> None:
    from huggingface_hub import constants

    cache = pathlib.Path(constants.HF_HUB_CACHE)
    while not cache.exists() and cache != cache.parent:
        cache = cache.parent
    free_bytes = shutil.disk_usage(cache).free
    if free_bytes < needed_bytes:
        raise DownloadError(
            f"{repo} needs {needed_bytes:,} bytes in {cache}, {free_bytes:,} are free",
            hint="free some space, or set HF_HOME to a folder on another disk",
        )


def _bar_class(repo: str, progress: Progress) -> type[Any]:
    """A progress bar for huggingface-hub that draws nothing and reports bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # There are bars that count files, and one that counts bytes off the wire, of which a
            # deduplicated transfer has fewer than the files: "Downloading bytes".
            self.reports = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self.reports:
                with self.get_lock():
                    self.n += n or 0
                progress(repo, int(self.n), int(self.total) if self.total else None)

    return Bar


def _fail_no_repo(repo: str, error: Exception) -> NoReturn:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        raise DownloadError(
            f"{repo} is gated: its owner lets in those who accepted its licence",
            hint=f"accept at https://huggingface.co/{repo}, then `hf auth login` or set HF_TOKEN",
        ) from error
    raise ModelNotFound(
        f"{repo}: no such folder here, and no such model on Hugging Face",
        hint="check the spelling; for a private model `hf auth login` or set HF_TOKEN",
    ) from error


def _fail_transfer(repo: str, error: Exception) -> NoReturn:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DownloadError(
            f"{repo} cannot be downloaded: the disk is full",
            hint="free some space, or set HF_HOME to a folder on another disk",
        ) from error
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise DownloadError(
        f"{repo} is not on this machine and cannot be downloaded: {reason}",
        hint="check the network and proxy; what came so far is kept, and a new try resumes it",
    ) from error
