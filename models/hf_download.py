"""Models of the Hugging Face Hub, through huggingface-hub: its cache, tokens and settings hold.

A complete snapshot in the cache is used as it is, without a word to the network: a model that
answered yesterday answers on a plane, and nobody learns when it is used.
"""

import errno
import pathlib
import shutil
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from edgekv.errors import CheckpointCorrupt, DownloadError, ModelNotFound, UnsupportedModel
from edgekv.models.cache import Progress, ignore_progress
from edgekv.models.folder_files import CONFIG_FILE, find_shards

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
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def fetch_repo(
    repo: str,
    file: str | None = None,
    *,
    progress: Progress = ignore_progress,
    offline: bool = False,
) -> pathlib.Path:
    """The local path of a repository's safetensors model, or of one GGUF file in it.

    Args:
        repo: "owner/name".
        file: A GGUF file's path inside the repository; None for the safetensors model.
        progress: Told the bytes as they come, from worker threads.
        offline: Use the cache or raise.

    Raises:
        ModelNotFound: No such repository or file, or it is private.
        DownloadError: No network, a gated repository, no space.
        UnsupportedModel: The repository has no safetensors model.
    """
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
        _fail_unknown(repo, error)
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


def _fail_unknown(repo: str, error: Exception) -> NoReturn:
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
