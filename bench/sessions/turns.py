"""Conversations played on a runtime, one user a session, and whether two plays said the same."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from edgekv.bench.figures import ttft_ms
from edgekv.bench.sessions.conversations import Conversation
from edgekv.bench.sessions.drive import Driver, Pause, Tick, User
from edgekv.bench.workload import TextIds, answer
from edgekv.config import SamplingParams
from edgekv.errors import EdgeKVError
from edgekv.runtime import Reply, ReplyStream, Runtime, Session
from edgekv.tokenizer import Tokenizer

_APP_PREFIX = "session-"
_TURNS_PER_SESSION = 1000  # stretches of text set aside for each session
_PAST = _TURNS_PER_SESSION - 1  # the one of what was said before the play


def app_name(session: int) -> str:
    """Each session has an app of its own: sessions of one app would share prefixes."""
    return f"{_APP_PREFIX}{session}"


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A turn whose answer was not whole when time was up.

    Attributes:
        session: Whose turn it was.
        waited_ms: Since its submission.
        reply: What of the answer had come.
        num_tokens: Tokens of the session with KV by then.
    """

    session: int
    waited_ms: float
    reply: Reply
    num_tokens: int


@dataclass(kw_only=True)
class Played:
    """What came of all conversations.

    A turn that time cut off counts: with what came of its answer, and if nothing had come yet, with
    the time it had waited as its TTFT, which is less than it would have been.

    Attributes:
        replies: By session, in order of turns.
        inputs: Token ids of each turn's input, by session.
        pasts: Token ids of each session from before the play.
        elapsed_ms: From the first submission to the last answer's end, or until time was up.
        unfinished: Turns that time cut off.
        errors: One for each session that ended early.
    """

    replies: list[list[Reply]]
    inputs: list[list[list[int]]]
    pasts: list[list[int]] = field(default_factory=list)
    elapsed_ms: float = 0.0
    unfinished: list[Unfinished] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def all_replies(self) -> list[Reply]:
        """Of all sessions, session by session; at last what came of unfinished answers."""
        whole = [reply for replies in self.replies for reply in replies]
        return [*whole, *(turn.reply for turn in self.unfinished)]

    @property
    def num_unanswered(self) -> int:
        """Turns without a first token."""
        return sum(not turn.reply.token_ids for turn in self.unfinished)

    @property
    def ttft_ms(self) -> list[float]:
        """Submission to first token, of every turn."""
        whole = [ttft_ms(reply.stats) for replies in self.replies for reply in replies]
        cut = [
            ttft_ms(turn.reply.stats) if turn.reply.token_ids else turn.waited_ms
            for turn in self.unfinished
        ]
        return [*whole, *cut]

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
        known = [len(past) for past in self.pasts] or [0] * len(self.replies)
        for session, replies in enumerate(self.replies):
            if replies:
                last = replies[-1].stats
                known[session] = last.num_prompt_tokens + last.num_output_tokens
        once = [max(0, num - 1) for num in known]
        for turn in self.unfinished:
            once[turn.session] = max(once[turn.session], turn.num_tokens)
        return sum(once)

    def outputs_sha256(self) -> str:
        """Of all whole answers, session by session and turn by turn."""
        digest = hashlib.sha256()
        for replies in self.replies:
            for reply in replies:
                digest.update(f"{','.join(map(str, reply.token_ids))};".encode())
            digest.update(b"\n")
        return digest.hexdigest()


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


class Play:
    """Conversations on one runtime. Owned by the thread that plays them.

    Each turn's prompt is all tokens so far and the turn's input, answered greedily with exactly as
    many tokens as the turn says; so the answers depend on nothing but the model.

    Args:
        runtime: Its owner closes it.
        conversations: One session each.
        turn_done: Told the number of turns that are done.
    """

    def __init__(
        self,
        runtime: Runtime,
        conversations: Sequence[Conversation],
        turn_done: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._runtime = runtime
        self._conversations = conversations
        self._turn_done = turn_done
        self._num_done = itertools.count(1)
        self._open: dict[int, Session] = {}  # from before the play
        self._driver = Driver()
        self._first_ms: float | None = None
        self.played = Played(
            replies=[[] for _ in conversations],
            inputs=draw_inputs(conversations, runtime.tokenizer),
            pasts=[[] for _ in conversations],
        )

    def recall(self, num_sessions: int | None = None) -> int:
        """Compute the KV of what was said before the play, one session after the other.

        Args:
            num_sessions: Only of the first so many; None is all.

        Returns:
            Tokens computed.
        """
        text = TextIds(self._runtime.tokenizer)
        for index, conversation in enumerate(self._conversations[:num_sessions]):
            if not conversation.num_past_tokens:
                continue
            session = self._open[index] = self._session(index)
            # The last of them is its answer.
            ids = text.stretch(
                max(1, conversation.num_past_tokens - 1), index * _TURNS_PER_SESSION + _PAST
            )
            self.played.pasts[index] = [*ids, *answer(session, ids, 1).token_ids]
        return sum(map(len, self.played.pasts))

    def run(
        self, *, num_busy: int | None = None, for_ms: float | None = None, tick: Tick | None = None
    ) -> Played:
        """Play all conversations to their ends, or until time is up.

        Args:
            num_busy: So many users play one conversation after the other without a pause, instead
                of each conversation when its time has come.
            for_ms: Time is up then.
            tick: See `Driver.run`.
        """
        users = (self._user(index) for index in range(len(self._conversations)))
        if num_busy is not None:
            queue = iter(range(len(self._conversations)))
            users = (self._busy_user(queue) for _ in range(num_busy))
        started_ms = self._driver.now_ms
        try:
            self._driver.run(users, for_ms=for_ms, tick=tick)
        finally:
            for session in self._open.values():
                session.close()
        first_ms = started_ms if for_ms is not None or self._first_ms is None else self._first_ms
        self.played.elapsed_ms = self._driver.now_ms - first_ms
        return self.played

    def _session(self, index: int) -> Session:
        return self._runtime.app(app_name(index)).session()

    def _user(self, index: int) -> User:
        yield Pause(self._conversations[index].start_ms)
        yield from self._converse(index, pauses=True)

    def _busy_user(self, queue: Iterator[int]) -> User:
        for index in queue:
            yield from self._converse(index, pauses=False)

    def _converse(self, index: int, *, pauses: bool) -> User:
        played = self.played
        tokens = list(played.pasts[index])
        turns = self._conversations[index].turns
        with self._open.pop(index, None) or self._session(index) as session:
            for turn, input_ids in zip(turns, played.inputs[index], strict=True):
                if pauses:
                    yield Pause(turn.think_ms)
                submitted_ms = self._driver.now_ms
                if self._first_ms is None:
                    self._first_ms = submitted_ms
                tokens += input_ids
                sampling = SamplingParams(max_tokens=turn.output_tokens, ignore_eos=True)
                try:
                    stream = session.submit_ids(tokens, sampling)
                    reply = yield stream
                except EdgeKVError as error:
                    played.errors.append(f"{type(error).__name__}: {error}")
                    return
                except GeneratorExit:  # time is up
                    self._cut_off(index, stream, submitted_ms)
                    raise
                assert reply is not None
                assert len(reply.token_ids) == turn.output_tokens, "an answer was cut"
                played.replies[index].append(reply)
                self._turn_done(next(self._num_done))
                tokens += reply.token_ids

    def _cut_off(self, index: int, stream: ReplyStream, submitted_ms: float) -> None:
        reply = stream.reply
        if reply is None:
            return  # it has failed
        turn = Unfinished(
            session=index,
            waited_ms=self._driver.now_ms - submitted_ms,
            reply=reply,
            num_tokens=stream.prefill_progress[0] + max(0, len(reply.token_ids) - 1),
        )
        self.played.unfinished.append(turn)


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
            a.pasts[session] if a.pasts else (),
            a.inputs[session],
            [reply.token_ids for reply in a.replies[session]],
            [reply.token_ids for reply in b.replies[session]],
        )
        if difference is not None:
            found.append(difference)
    return found


def _difference(
    past: Sequence[int],
    inputs: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
) -> Difference | None:
    prefix = list(past)
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
