"""What `edgekv fit` is asked for: values, which look at no file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.config import check_int
from edgekv.errors import ConfigError
from edgekv.predict.fit.corpus import Corpus
from edgekv.predict.fit.shapes import FeatureOptions
from edgekv.predict.predictor import Kind
from edgekv.predict.tensor_file import SUFFIX

PIECE_TOKENS = 512
RANK = 512
NUM_TOKENS = 200_000
Watch = Callable[[str, int, int], None]  # what happens, how much is done, of how much

# What an interrupted call leaves beside its output: sums over text, and what a training came to.
PARTIAL, TRAINING = f".partial{SUFFIX}", f".training{SUFFIX}"


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
        corpus: The text.
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
    corpus: Corpus = field(default_factory=Corpus)
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
        check_int("finetune", self.finetune, 0, 1 << 24)
        check_int("tokens", self.num_tokens, 32 * PIECE_TOKENS, 1 << 40)

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
    def kind(self) -> Kind:
        """The predictor's kind."""
        return "self" if self.aux is None else "aux"

    @property
    def partial(self) -> Path:
        """The file in which an interrupted fit leaves its sums."""
        return self.out.with_name(self.out.name + PARTIAL)

    @property
    def trained(self) -> Path:
        """The file in which an interrupted training leaves what it came to."""
        return self.out.with_name(self.out.name + TRAINING)
