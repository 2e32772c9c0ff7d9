"""What `edgekv fit` is asked for."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.config import check_float, check_int
from edgekv.errors import ConfigError
from edgekv.predict.fit.corpus import STDLIB, Corpus, corpus_files
from edgekv.predict.fit.shapes import FeatureOptions
from edgekv.predict.predictor import Kind
from edgekv.predict.tensor_file import SUFFIX, half_of

PIECE_TOKENS = 512
RANK = 512
NUM_TOKENS = 200_000
Watch = Callable[[str, int, int], None]  # what happens, how much is done, of how much


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What is fitted, to what.

    Attributes:
        base: Whose KV is predicted.
        out: The file to write.
        aux: The auxiliary model, or `prune:FRACTION` of the base; None fits kind "self".
        start: A predictor to train further, a file or the name of one that comes with edgekv;
            what it is says the file, and no closed form is fitted.
        self_depth: Kind "self": how many of the base's first layers run.
        features: What is looked at.
        rank: Of the factors; None for full rank.
        num_tokens: Of text.
        texts: UTF-8 files; () takes the standard library.
        stdlib_share: Part of the text that comes from the standard library all the same.
        finetune: Gradient steps behind the closed form.
    """

    base: str
    out: Path
    aux: str | None = None
    start: str | None = None
    self_depth: int | None = None
    features: FeatureOptions = field(default_factory=FeatureOptions)
    rank: int | None = RANK
    num_tokens: int = NUM_TOKENS
    texts: tuple[Path, ...] = ()
    stdlib_share: float = 0.0
    finetune: int = 0

    def __post_init__(self) -> None:
        if self.start is not None:
            self._check_start()
        elif (self.aux is None) == (self.self_depth is None):
            raise ConfigError(
                "a predictor has one auxiliary",
                hint="pass either --aux MODEL or --self-depth LAYERS",
            )
        if self.self_depth is not None:
            check_int("self-depth", self.self_depth, 1, 1 << 12)
        if self.rank is not None:
            check_int("rank", self.rank, 1, 1 << 16)
        check_float("stdlib-share", self.stdlib_share, 0.0, 1.0)
        corpus_files(self.texts)
        check_int("finetune", self.finetune, 0, 1 << 24)
        check_int("tokens", self.num_tokens, 32 * PIECE_TOKENS, 1 << 40)
        check_out(self.out)

    def _check_start(self) -> None:
        fitted = (self.self_depth, self.features, self.rank, self.num_tokens)
        if fitted != (None, FeatureOptions(), RANK, NUM_TOKENS):
            raise ConfigError(
                "a predictor that is trained further keeps its depth, features and rank, and is "
                "not fitted to tokens again",
                hint="leave them out, or --from",
            )
        if not self.finetune:
            raise ConfigError("training further takes steps", hint="pass --finetune STEPS")

    @property
    def corpus(self) -> Corpus:
        """What is fitted on."""
        return Corpus(texts=self.texts, stdlib_share=self.stdlib_share)

    @property
    def corpus_name(self) -> str:
        """What is fitted on, in words."""
        names = [path.name for path in self.texts]
        if self.stdlib_share or not names:
            names.append(STDLIB)
        return ", ".join(names)

    @property
    def kind(self) -> Kind:
        """See `Predictor`."""
        return "self" if self.aux is None else "aux"

    @property
    def text_key(self) -> str:
        """Of what is fitted on."""
        stats = [(path.resolve(), path.stat()) for path in self.texts]
        texts = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return f"{texts} {self.stdlib_share} {sys.version}"

    @property
    def partial(self) -> Path:
        """Where an interrupted fit leaves its sums."""
        return _beside(self.out, "partial")

    @property
    def trained(self) -> Path:
        """Where an interrupted training leaves what it came to."""
        return _beside(self.out, "training")


def check_out(out: Path) -> None:
    """Make sure that a predictor can be written, before minutes are spent.

    Raises:
        ConfigError: It cannot.
    """
    if not out.parent.is_dir() or (out.exists() and not out.is_file()):
        raise ConfigError.of("out", str(out), "a file in a folder that exists")
    probe = half_of(_beside(out, "training"))  # no name is longer
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error.strerror}", hint="pass another -o"
        ) from error


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}{SUFFIX}")
