"""What a repository of the Hugging Face Hub holds at one commit, by its own listing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgekv.errors import ModelNotFound, UnsupportedModel
from edgekv.models.folder_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, weight_names
from edgekv.models.hub_errors import fail_stranger
from edgekv.models.reference import RepoReference, is_gguf

TIMEOUT_S = 10.0  # for the Hub to say what a repository holds
_NUM_NAMED_MAX = 20  # files in a hint


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a commit."""

    repo: str  # owner/name
    commit: str
    sizes: Mapping[str, int | None]  # of each file, in bytes, as far as known

    @classmethod
    def ask(cls, wanted: RepoReference, revision: str | None) -> "Listing":
        """The listing of a revision; its errors are those of `hub_errors.typed_errors`."""
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(
                wanted.repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S
            )
        except (KeyError, TypeError, AttributeError) as error:  # JSON, but of something else
            fail_stranger(wanted, error)
        if not info.sha:
            fail_stranger(wanted, ValueError("no commit"))
        sizes = {entry.rfilename: entry.size or None for entry in info.siblings or ()}
        return cls(repo=wanted.repo, commit=info.sha, sizes=sizes)

    def check_has(self, file: str) -> None:
        """Make sure that a GGUF file is there.

        Raises:
            ModelNotFound: It is not; the hint has those that are.
        """
        if file not in self.sizes:
            ggufs = sorted(filter(is_gguf, self.sizes))
            raise ModelNotFound(
                f"{self.repo} has no file {file}",
                hint="its GGUF files: " + (", ".join(ggufs[:_NUM_NAMED_MAX]) or "none"),
            )

    def weights(self, read_index: Callable[[], dict[str, object]]) -> list[str]:
        """The safetensors files of the model, after the index that names them if there is one.

        Args:
            read_index: Reads that index; called only where it decides.

        Raises:
            UnsupportedModel: There are none, or not all.
            CheckpointCorrupt: The index is malformed.
        """
        if CONFIG_FILE not in self.sizes or not any(
            name.endswith(".safetensors") for name in self.sizes
        ):
            ggufs = sorted(filter(is_gguf, self.sizes))
            raise UnsupportedModel(
                f"{self.repo} has no config.json with safetensors",
                hint=f"name one of its GGUF files: {self.repo}/{ggufs[0]}"
                if ggufs
                else "supported: safetensors and GGUF",
            )
        weights = weight_names(self.sizes, read_index, self.repo)
        lost = [name for name in weights if name not in self.sizes]
        if lost:
            raise UnsupportedModel(
                f"{self.repo}: its {INDEX_FILE} names {lost[0]}, which it does not have",
                hint="the repository is broken; another revision may be whole",
            )
        has_index = INDEX_FILE in self.sizes and weights != [SINGLE_FILE]
        return [*([INDEX_FILE] if has_index else []), *weights]
