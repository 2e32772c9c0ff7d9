"""A model of the Hugging Face Hub without its weights: what is known before it is downloaded.

A hollow copy has files as long as those on the Hub. Of safetensors and GGUF only the header is
filled in, and what follows is a hole, which takes no room on disk. Whatever reads headers reads
such a copy as it does any other model. huggingface-hub's cache stays as it is.
"""

import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar, cast

from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt, ModelError, TokenizerError
from edgekv.models import gguf_file, safetensors_file
from edgekv.models.folder_files import CONFIG_FILE, INDEX_FILE, JSON_BYTES_MAX, read_json
from edgekv.models.hub_errors import typed_errors
from edgekv.models.listing import Listing
from edgekv.models.reference import RepoReference
from edgekv.models.remote_file import RemoteFile, fetch_range, fetch_whole
from edgekv.models.snapshot import TOKENIZERS

_NUM_REQUESTS_MAX = 4  # at once
_TENSOR_BYTES_MAX = 1 << 20  # of those that are read

T = TypeVar("T")


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, of which at least the headers can be read."""

    path: pathlib.Path  # a .gguf file or a folder
    hollow_below: pathlib.Path | None = None  # a hollow copy's path is that on the Hub below this

    def told(self, error: ModelError) -> ModelError:
        """An error about these files, as one about those that they are copies of."""
        if self.hollow_below is None:
            return error
        hint = error.hint.replace(FETCH_AGAIN, "it is so on the Hub; another revision may be whole")
        return type(error)(str(error).replace(f"{self.hollow_below}/", ""), hint=hint)


@contextmanager
def hollow_copy(wanted: RepoReference) -> Iterator[ModelFiles]:
    """A folder or GGUF file without weights, which is gone after the block.

    Raises:
        ModelNotFound, DownloadError: It cannot be had.
        UnsupportedModel: A repository without safetensors, or a GGUF file of an unknown kind.
        CheckpointCorrupt: A header is malformed, or longer than its file.
        TokenizerError: A repository without a tokenizer.
    """
    with tempfile.TemporaryDirectory(prefix="edgekv-") as folder:
        root = pathlib.Path(folder)
        copy = ModelFiles(root.joinpath(wanted.repo, wanted.file or ""), root)
        try:
            with typed_errors(wanted, wanted.revision):
                _Filling(Listing.ask(wanted, wanted.revision), root).fill(wanted.file)
        except CheckpointCorrupt as error:
            raise copy.told(error) from error
        yield copy


class _Filling:
    """Fills a hollow copy below `root`."""

    def __init__(self, listing: Listing, root: pathlib.Path) -> None:
        self._listing = listing
        self._root = root

    def fill(self, file: str | None) -> None:
        """Write one GGUF file, or the whole folder."""
        if file is None:
            self._fill_folder()
        else:
            self._fill_gguf(file)

    def _fill_folder(self) -> None:
        names = self._listing.weights(lambda: read_json(self._whole(INDEX_FILE)))
        if not any(name in self._listing.sizes for name in TOKENIZERS):
            raise TokenizerError(
                f"{self._listing.repo} holds neither {' nor '.join(TOKENIZERS)}",
                hint="the model it was made from may have one",
            )
        self._whole(CONFIG_FILE)
        self._headers([name for name in names if name != INDEX_FILE])

    def _fill_gguf(self, name: str) -> None:
        from edgekv.models.gguf_config import ROPE_FREQS, ROPE_LONG, ROPE_SHORT  # it needs numpy

        self._listing.check_has(name)
        path, header = self._header(name, gguf_file.parse_header)
        with path.open("r+b") as file:
            # These tensors say what a configuration should; they are short.
            for tensor in {ROPE_FREQS, ROPE_LONG, ROPE_SHORT} & header.tensors.keys():
                info = header.tensors[tensor]
                end = min(info.end, info.start + _TENSOR_BYTES_MAX)
                file.seek(info.start)
                file.write(fetch_range(self._listing, name, info.start, end)[0])

    def _headers(self, names: Sequence[str]) -> None:
        pool = ThreadPoolExecutor(_NUM_REQUESTS_MAX)
        try:
            list(pool.map(lambda name: self._header(name, safetensors_file.parse_header), names))
        finally:
            pool.shutdown(cancel_futures=True)

    def _header(
        self, name: str, parse: Callable[[pathlib.PurePath, BinaryIO], T]
    ) -> tuple[pathlib.Path, T]:
        """Fetch, check and write the header of a file."""
        remote = RemoteFile(self._listing, name)
        shown = pathlib.PurePosixPath(self._listing.repo, name)
        header = parse(shown, cast("BinaryIO", remote))
        path = self._place(name)
        path.write_bytes(remote.fetched)
        with path.open("r+b") as file:
            file.truncate(remote.num_bytes)
        return path, header

    def _whole(self, name: str) -> pathlib.Path:
        path = self._place(name)
        path.write_bytes(fetch_whole(self._listing, name, JSON_BYTES_MAX + 1))
        return path

    def _place(self, name: str) -> pathlib.Path:
        path = self._root / self._listing.repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
