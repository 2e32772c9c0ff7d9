"""Conversations played on a runtime, one user a session, and whether two plays said the same."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgekv.bench.sessions.conversations import Conversation
from edgekv.bench.sessions.drive import Driver, Pause, User
from edgekv.bench.workload import TextIds
from edgekv.config import SamplingParams
from edgekv.errors import EdgeKVError
from edgekv.metrics import Stats
from edgekv.runtime import Reply, Runtime
from edgekv.tokenizer import Tokenizer

_APP_PREFIX = "session-"
_TURNS_PER_SESSION = 1000  # stretches of text set aside for each session


def app_name(session: int) -> str:
    """Each session has an app of its own: sessions of one app would share prefixes."""
    return f"{_APP_PREFIX}{session}"


@dataclass(kw_only=True)
class Played:
    """What came of all conversations.

    Attributes:
        replies: By session, in order of turns.
        inputs: Token ids of each turn's input, by session.
        elapsed_ms: From the first submission to the last answer's end.
        errors: One for each session that ended early.
    """

    replies: list[list[Reply]]
    inputs: list[list[list[int]]]
    elapsed_ms: float = 0.0
    errors: list[str] = field(default_factory=list)

    @property
    def all_replies(self) -> list[Reply]:
        """Of all sessions, session by session."""
        return [reply for replies in self.replies for reply in replies]

    @property
    def ttft_ms(self) -> list[float]:
        """Submission to first token, of every turn."""
        return [ttft_ms(reply.stats) for reply in self.all_replies]

    @property
    def tbt_ms(self) -> list[float]:
        """Every gap between two tokens of an answer."""
        return [gap for reply in self.all_replies for gap in reply.gaps_ms]

    @property
    def num_output_tokens(self) -> int:
        """Of all answers."""
        return sum(len(reply.token_ids) for reply in self.all_replies)

    @property
    def num_once_tokens(self) -> int:
        """Tokens to compute if none is computed twice: all but each session's very last."""
        lasts = [replies[-1] for replies in self.replies if replies]
        return sum(r.stats.num_prompt_tokens + r.stats.num_output_tokens - 1 for r in lasts)

    def outputs_sha256(self) -> str:
        """Of all answers, session by session and turn by turn."""
        digest = hashlib.sha256()
        for replies in self.replies:
            for reply in replies:
                digest.update(f"{','.join(map(str, reply.token_ids))};".encode())
            digest.update(b"\n")
        return digest.hexdigest()


def ttft_ms(stats: Stats) -> float:
    """TTFT; for an answer without visible text (control tokens only) its first token's time."""
    return stats.queue_ms + stats.prefill_ms if stats.ttft_ms is None else stats.ttft_ms


def draw_inputs(
    conversations: Sequence[Conversation], tokenizer: Tokenizer
) -> list[list[list[int]]]:
    """What each session says at each turn, as token ids."""
    text = TextIds(tokenizer)
    return [
        [
            text.stretch(turn.input_tokens, session * _TURNS_PER_SESSION + number)
            for number, turn in enumerate(conversation.turns)
        ]
        for session, conversation in enumerate(conversations)
    ]


def play(
    runtime: Runtime,
    conversations: Sequence[Conversation],
    inputs: list[list[list[int]]],
    turn_done: Callable[[int], None],
) -> Played:
    """Play all conversations to their ends.

    Each turn's prompt is all tokens so far and the turn's input, answered greedily with exactly as
    many tokens as the turn says; so the answers depend on nothing but the model.

    Args:
        runtime: Its owner closes it.
        conversations: One session each.
        inputs: See `draw_inputs`.
        turn_done: Told the number of turns that are done.
    """
    driver = Driver()
    played = Played(replies=[[] for _ in conversations], inputs=inputs)
    submitted_ms: list[float] = []
    num_done = itertools.count(1)

    def user(session: int, conversation: Conversation) -> User:
        yield Pause(conversation.start_ms)
        tokens: list[int] = []
        with runtime.app(app_name(session)).session() as open_session:
            for turn, input_ids in zip(conversation.turns, inputs[session], strict=True):
                yield Pause(turn.think_ms)
                submitted_ms.append(driver.now_ms)
                tokens += input_ids
                sampling = SamplingParams(max_tokens=turn.output_tokens, ignore_eos=True)
                try:
                    reply = yield open_session.submit_ids(tokens, sampling)
                except EdgeKVError as error:
                    played.errors.append(f"{type(error).__name__}: {error}")
                    return
                assert reply is not None
                assert len(reply.token_ids) == turn.output_tokens, "an answer was cut"
                played.replies[session].append(reply)
                turn_done(next(num_done))
                tokens += reply.token_ids

    driver.run(user(i, conversation) for i, conversation in enumerate(conversations))
    played.elapsed_ms = driver.now_ms - min(submitted_ms)
    return played


TIE_LOGITS = 1e-4  # closer than this, two tokens may change places with the shape of a step


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where a session's answers part.

    Attributes:
        prefix: All tokens before, inputs included.
        first: The one run's next token.
        second: The other's.
    """

    prefix: tuple[int, ...]
    first: int
    second: int


def differences(a: Played, b: Played) -> list[Difference]:
    """One for each session whose answers differ; those that ended early are compared as far."""
    found = []
    for session in range(len(a.replies)):
        difference = _difference(
            a.inputs[session],
            [reply.token_ids for reply in a.replies[session]],
            [reply.token_ids for reply in b.replies[session]],
        )
        if difference is not None:
            found.append(difference)
    return found


def _difference(
    inputs: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
) -> Difference | None:
    prefix: list[int] = []
    for input_ids, mine, other in zip(inputs, ours, theirs, strict=False):
        prefix += input_ids
        for first, second in zip(mine, other, strict=True):
            if first != second:
                return Difference(prefix=tuple(prefix), first=first, second=second)
            prefix.append(first)
    return None


def num_ties(runtime: Runtime, found: Sequence[Difference]) -> int:
    """How many differences are between two tokens that the model finds equally likely."""
    return sum(_is_tie(runtime, difference) for difference in found)


def _is_tie(runtime: Runtime, difference: Difference) -> bool:
    logits = runtime.logits(difference.prefix)[-1]
    best = float(logits.max())
    return all(best - float(logits[t]) <= TIE_LOGITS for t in (difference.first, difference.second))
