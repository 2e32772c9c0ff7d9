"""What of a repository of the Hugging Face Hub is in huggingface-hub's cache.

The cache may have been filled by anybody, file by file. A snapshot is what is there of one commit;
it is whole once all that a model is made of is there, and it is known of what may be there (a chat
template, say) whether the repository has it. The cache says that in two ways, of which both are
written here too: the file, or an empty one of its name below `.no_exist`.
"""

import contextlib
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.folder_files import CONFIG_FILE, INDEX_FILE, read_json, weight_names
from edgekv.models.safetensors_file import read_header

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # one of them is
BESIDE = (  # what there may be beside configuration, weights and tokenizer
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository in the cache; the folder need not exist."""

    folder: pathlib.Path  # …/models--owner--name/snapshots/COMMIT

    @property
    def commit(self) -> str:
        """The commit's hash."""
        return self.folder.name

    def lacks(self, file: str | None) -> list[str]:
        """Files that a model needs and that are missing or damaged; one file, or the whole."""
        if file is not None:
            return [] if (self.folder / file).is_file() else [file]
        missing = [] if (self.folder / CONFIG_FILE).is_file() else [CONFIG_FILE]
        missing += self._lacking_weights()
        if not any((self.folder / name).is_file() for name in TOKENIZERS):
            missing += [name for name in TOKENIZERS if self._is_unknown(name)][:1]
        return missing

    def _lacking_weights(self) -> list[str]:
        try:
            names = {path.name for path in self.folder.iterdir() if path.is_file()}
            index = self.folder / INDEX_FILE
            shards = weight_names(names, lambda: read_json(index), str(self.folder))
        except (OSError, CheckpointCorrupt, UnsupportedModel):
            return ["its weights"]
        return [name for name in shards if not _is_whole(self.folder / name)]

    def unknown(self, file: str | None) -> list[str]:
        """Files that a model may have, and nobody has asked the repository for yet."""
        return [name for name in BESIDE if self._is_unknown(name)] if file is None else []

    def _is_unknown(self, name: str) -> bool:
        return not (self.folder / name).is_file() and not self._absent(name).exists()

    def note_absent(self, names: Sequence[str]) -> None:
        """Remember that the repository has no such files, as huggingface-hub does."""
        with contextlib.suppress(OSError):  # a cache that cannot be written is asked for each time
            for name in names:
                self._absent(name).parent.mkdir(parents=True, exist_ok=True)
                self._absent(name).touch()

    def _absent(self, name: str) -> pathlib.Path:
        return self.folder.parent.parent / ".no_exist" / self.commit / name

    def path(self, file: str | None) -> pathlib.Path:
        """The folder, or one file in it."""
        return self.folder if file is None else self.folder / file

    def remove(self, name: str) -> None:
        """Take a damaged file away, so that it is fetched again. Raises OSError."""
        path = self.folder / name
        target = path.resolve()
        path.unlink(missing_ok=True)
        if target.is_relative_to(self.folder.parent.parent.resolve()):  # not a user's own
            target.unlink(missing_ok=True)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        with contextlib.suppress(OSError):
            return (self.folder / name).stat().st_size
        return None


def _is_whole(path: pathlib.Path) -> bool:
    """Whether a safetensors file is there and as long as its header says."""
    try:
        read_header(path)
    except CheckpointCorrupt:
        return False
    return True


def cache_folder(repo: str) -> pathlib.Path:
    """Where huggingface-hub keeps a repository; need not exist."""
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--"))


def find_snapshot(repo: str, revision: str | None) -> Snapshot | None:
    """What is in the cache of a repository at a revision, perhaps a commit's hash."""
    from huggingface_hub import constants

    folder = cache_folder(repo)
    commit = revision or constants.DEFAULT_REVISION
    with contextlib.suppress(OSError, ValueError):
        commit = (folder / "refs" / commit).read_text(encoding="ascii").strip() or commit
    snapshot = folder / "snapshots" / commit
    return Snapshot(snapshot) if snapshot.is_dir() else None
