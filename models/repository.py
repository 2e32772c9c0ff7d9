"""Fetches what is missing of a repository of the Hugging Face Hub, through huggingface-hub.

Its cache, tokens and settings hold. Which files make a model says the repository's own listing;
what came is compared with the sizes there, for in the Hub's place a proxy may answer, or the login
page of a network.
"""

import contextlib
import errno
import glob
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from edgekv.errors import DownloadError, ModelNotFound, UnsupportedModel
from edgekv.models.cache import Progress
from edgekv.models.folder_files import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    read_json,
    stand_in,
    weight_names,
)
from edgekv.models.reference import RepoReference, is_gguf
from edgekv.models.snapshot import (
    BESIDE,
    TOKENIZER_CONFIG,
    TOKENIZERS,
    Snapshot,
    cache_folder,
    find_snapshot,
)

_TEMPLATES = "additional_chat_templates/"

_FOLDER_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
_TIMEOUT_S = 10.0  # for the Hub to say what a repository holds
_STRANGER_HINT = (
    "a proxy or the login page of a network may answer in the Hub's place: log in with a browser, "
    "or check HTTPS_PROXY and HF_ENDPOINT"
)

_log = logging.getLogger(__name__)


def fetch_repository(wanted: RepoReference, *, progress: Progress, offline: bool) -> pathlib.Path:
    """The local path of a repository's model; what is missing of it is fetched.

    Raises:
        ModelNotFound: There is no such repository, revision or file.
        DownloadError: What is missing cannot be had; the message names it.
        UnsupportedModel: A repository without safetensors.
    """
    from huggingface_hub import constants

    snapshot = find_snapshot(wanted.repo, wanted.revision)
    missing = [str(wanted)] if snapshot is None else snapshot.lacks(wanted.file)
    unknown = [] if snapshot is None else snapshot.unknown(wanted.file)
    # At the commit that is there: files of two commits do not fit each other.
    commit = None if snapshot is None else snapshot.commit
    if snapshot is not None and not missing and not unknown:
        return snapshot.path(wanted.file)
    try:
        if offline or constants.HF_HUB_OFFLINE:
            raise DownloadError(
                f"{wanted} is not downloaded completely",
                hint=f"run once with the network allowed: edgekv pull {wanted}",
            )
        return _Download(wanted, progress, commit=commit).run()
    except (DownloadError, ModelNotFound) as error:  # the repository may be gone, too
        if snapshot is None:
            raise
        if missing:
            what = f"{', '.join(missing)} of {wanted} missing or damaged, and {error}"
            raise DownloadError(what, hint=error.hint) from error
        if TOKENIZER_CONFIG in unknown:
            _log.warning(
                "%s: %s, with its chat template, is not in the cache, and %s",
                wanted,
                TOKENIZER_CONFIG,
                error,
            )
        return snapshot.path(wanted.file)


def renew_repository(wanted: RepoReference, *, progress: Progress, force: bool) -> pathlib.Path:
    """Fetch what is missing, damaged or newer on the Hub, with `force` all of it.

    Where the Hub cannot be asked, a model that is whole stays as it is, with a warning.

    Raises:
        ModelNotFound, DownloadError, UnsupportedModel: See `fetch_repository`.
    """
    try:
        return _Download(wanted, progress, force=force).run()
    except (DownloadError, ModelNotFound) as error:
        snapshot = find_snapshot(wanted.repo, wanted.revision)
        if force or snapshot is None or snapshot.lacks(wanted.file):
            raise
        _log.warning("%s is whole, but could not be compared with the Hub's: %s", wanted, error)
        return snapshot.path(wanted.file)


class _Download:
    """One download of what is wanted of a repository, through huggingface-hub.

    `commit` is which one; None is the newest of the revision that is wanted.
    """

    def __init__(
        self,
        wanted: RepoReference,
        progress: Progress,
        *,
        commit: str | None = None,
        force: bool = False,
    ) -> None:
        self._wanted, self._repo = wanted, wanted.repo
        self._progress = progress
        self._at = commit or wanted.revision
        self._force = force

    def run(self) -> pathlib.Path:
        """Fetch it; the errors are those of `fetch_repository`."""
        from huggingface_hub import snapshot_download

        with _typed_errors(self._wanted, self._at):
            snapshot, sizes = self._list()
            names = self._choose(sizes)
            self._remove_damaged(snapshot, names, sizes)
            missing = [n for n in names if self._force or snapshot.size(n) is None]
            _check_space(self._repo, sum(sizes[name] or 0 for name in missing))
            folder = snapshot_download(
                self._repo,
                revision=self._at,
                allow_patterns=[glob.escape(name) for name in names],
                force_download=self._force,
                tqdm_class=_bar_class(self._repo, self._progress),
            )
        came = Snapshot(pathlib.Path(folder))
        self._check_sizes(came, names, sizes)
        came.note_absent([name for name in (*TOKENIZERS, *BESIDE) if name not in sizes])
        return came.path(self._wanted.file)

    def _list(self) -> tuple[Snapshot, dict[str, int | None]]:
        """The snapshot of the commit, perhaps still empty, and files' sizes as far as known."""
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(
                self._repo, revision=self._at, files_metadata=True, timeout=_TIMEOUT_S
            )
        except (KeyError, TypeError, AttributeError) as error:  # JSON, but of something else
            _fail_stranger(self._wanted, error)
        if not info.sha:
            _fail_stranger(self._wanted, ValueError("no commit"))
        sizes = {entry.rfilename: entry.size or None for entry in info.siblings or ()}
        return Snapshot(cache_folder(self._repo) / "snapshots" / info.sha), sizes

    def _choose(self, sizes: dict[str, int | None]) -> list[str]:
        """Which files make the model, whether they are here or not."""
        file = self._wanted.file
        if file is not None:
            if file not in sizes:
                ggufs = sorted(filter(is_gguf, sizes))
                raise ModelNotFound(
                    f"{self._repo} has no file {file}",
                    hint="its GGUF files: " + (", ".join(ggufs[:20]) or "none"),
                )
            return [file]
        if CONFIG_FILE not in sizes or not any(name.endswith(".safetensors") for name in sizes):
            _fail_no_safetensors(self._repo, sizes)
        weights = weight_names(sizes, lambda: self._read_index(sizes[INDEX_FILE]), self._repo)
        lost = [name for name in weights if name not in sizes]
        if lost:
            raise UnsupportedModel(
                f"{self._repo}: its {INDEX_FILE} names {lost[0]}, which it does not have",
                hint="the repository is broken; another revision may be whole",
            )
        beside = [CONFIG_FILE, *TOKENIZERS, *BESIDE]
        beside += [name for name in sizes if name.startswith(_TEMPLATES)]
        index = [INDEX_FILE] if len(weights) > 1 or weights[0] != SINGLE_FILE else []
        return [name for name in (*beside, *index, *weights) if name in sizes]

    def _read_index(self, num_bytes: int | None) -> dict[str, object]:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            self._repo, INDEX_FILE, revision=self._at, force_download=self._force
        )
        snapshot = Snapshot(pathlib.Path(path).parent)
        self._check_sizes(snapshot, [INDEX_FILE], {INDEX_FILE: num_bytes})
        return read_json(snapshot.folder / INDEX_FILE)

    def _remove_damaged(
        self, snapshot: Snapshot, names: Sequence[str], sizes: dict[str, int | None]
    ) -> None:
        """Take away what is not as long as on the Hub: huggingface-hub would keep it."""
        for name in names:
            here = snapshot.size(name)
            if here is not None and sizes[name] is not None and here != sizes[name]:
                snapshot.remove(name)

    def _check_sizes(
        self, came: Snapshot, names: Sequence[str], sizes: dict[str, int | None]
    ) -> None:
        for name in names:
            here, there = came.size(name), sizes[name]
            if here is None or there not in (None, here):
                came.remove(name)
                raise DownloadError(
                    f"{name} of {self._repo} came with {here or 0:,} bytes, not {there or 0:,}",
                    hint=_STRANGER_HINT,
                )


def _fail_no_safetensors(repo: str, names: Iterable[str]) -> NoReturn:
    ggufs = sorted(filter(is_gguf, names))
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


# --- what went wrong, in words ---


@contextlib.contextmanager
def _typed_errors(wanted: RepoReference, revision: str | None) -> Iterator[None]:
    """Errors of huggingface-hub, of HTTP and of whoever answers in the Hub's place, as ours."""
    from huggingface_hub import errors

    # The HTTP library's base error, whichever library this version of huggingface-hub uses.
    http_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{wanted.repo} is gated: its owner lets in those who accepted its licence",
            hint=f"accept at https://huggingface.co/{wanted.repo}, then `hf auth login` or set "
            "HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{wanted.repo} has no revision {revision}",
            hint="its page lists its branches and tags"
            if revision == wanted.revision
            else f"edgekv pull {wanted} takes the newest",
        ) from error
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise ModelNotFound(
            f"{wanted}: no such file or folder here, and no such model on Hugging Face",
            hint="check the spelling; for a private model `hf auth login` or set HF_TOKEN",
        ) from error
    except (http_error, OSError, RuntimeError) as error:  # RuntimeError: from hf_xet
        _fail_transfer(wanted, error)
    except ValueError as error:  # no JSON
        _fail_stranger(wanted, error)


def _fail_transfer(wanted: RepoReference, error: Exception) -> NoReturn:
    from huggingface_hub import constants, errors

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DownloadError(
            f"{wanted} cannot be downloaded: the disk is full",
            hint="free some space, or set HF_HOME to a folder on another disk",
        ) from error
    if isinstance(error, OSError) and error.errno in _FOLDER_ERRORS:
        raise DownloadError(
            f"{wanted} cannot be downloaded into {constants.HF_HUB_CACHE}: {error.strerror}",
            hint="set HF_HOME to a folder that can be written",
        ) from error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.FileMetadataError | json.JSONDecodeError):
            _fail_stranger(wanted, error)
        cause = cause.__cause__
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise DownloadError(
        f"{wanted} cannot be downloaded: {reason}",
        hint="check the network and proxy; what came so far is kept, and a new try resumes it",
    ) from error


def _fail_stranger(wanted: RepoReference, error: Exception) -> NoReturn:
    """What answered is not the Hub, but a proxy or the login page of a network."""
    from huggingface_hub import constants

    document = error.doc if isinstance(error, json.JSONDecodeError) else ""
    is_page = stand_in(document[:200].encode(errors="replace")) is not None
    what = "answered with an HTML page" if is_page else "did not answer as the Hub does"
    raise DownloadError(
        f"{wanted} cannot be downloaded: {constants.ENDPOINT} {what}", hint=_STRANGER_HINT
    ) from error
