"""Fetches what is missing of a repository of the Hugging Face Hub, through huggingface-hub.

Its cache, tokens and settings hold. Which files make a model says the repository's own listing;
what came is compared with the sizes there, for in the Hub's place a proxy may answer, or the login
page of a network.
"""

import glob
import logging
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from edgekv.errors import DownloadError, ModelNotFound
from edgekv.models.cache import Progress
from edgekv.models.folder_files import CONFIG_FILE, INDEX_FILE, read_json
from edgekv.models.hub_errors import STRANGER_HINT, typed_errors
from edgekv.models.listing import Listing
from edgekv.models.reference import RepoReference
from edgekv.models.snapshot import (
    BESIDE,
    TOKENIZER_CONFIG,
    TOKENIZERS,
    Snapshot,
    cache_folder,
    find_snapshot,
)

_TEMPLATES = "additional_chat_templates/"

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

        with typed_errors(self._wanted, self._at):
            listing = Listing.ask(self._wanted, self._at)
            sizes = listing.sizes
            snapshot = Snapshot(cache_folder(self._repo) / "snapshots" / listing.commit)
            names = self._choose(listing)
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

    def _choose(self, listing: Listing) -> list[str]:
        """Which files make the model, whether they are here or not."""
        sizes, file = listing.sizes, self._wanted.file
        if file is not None:
            listing.check_has(file)
            return [file]
        weights = listing.weights(lambda: self._read_index(sizes[INDEX_FILE]))
        beside = [CONFIG_FILE, *TOKENIZERS, *BESIDE]
        beside += [name for name in sizes if name.startswith(_TEMPLATES)]
        return [*(name for name in beside if name in sizes), *weights]

    def _read_index(self, num_bytes: int | None) -> dict[str, object]:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            self._repo, INDEX_FILE, revision=self._at, force_download=self._force
        )
        snapshot = Snapshot(pathlib.Path(path).parent)
        self._check_sizes(snapshot, [INDEX_FILE], {INDEX_FILE: num_bytes})
        return read_json(snapshot.folder / INDEX_FILE)

    def _remove_damaged(
        self, snapshot: Snapshot, names: Sequence[str], sizes: Mapping[str, int | None]
    ) -> None:
        """Take away what is not as long as on the Hub: huggingface-hub would keep it."""
        for name in names:
            here = snapshot.size(name)
            if here is not None and sizes[name] is not None and here != sizes[name]:
                snapshot.remove(name)

    def _check_sizes(
        self, came: Snapshot, names: Sequence[str], sizes: Mapping[str, int | None]
    ) -> None:
        for name in names:
            here, there = came.size(name), sizes[name]
            if here is None or there not in (None, here):
                came.remove(name)
                raise DownloadError(
                    f"{name} of {self._repo} came with {here or 0:,} bytes, not {there or 0:,}",
                    hint=STRANGER_HINT,
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
