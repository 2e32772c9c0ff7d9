"""Conversations played on a runtime, one user a session, and whether two plays said the same."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from edgekv.bench.sessions.conversations import Talk
from edgekv.bench.sessions.drive import Asked, Driver, Pause, Tick, User
from edgekv.bench.workload import TextIds, answer
from edgekv.errors import EdgeKVError
from edgekv.runtime import Runtime, Session

_TURNS_PER_SESSION = 1000  # stretches of text set aside for each session
_PAST = _TURNS_PER_SESSION - 1  # the one of what was said before the play


def app_name(session: int) -> str:
    """Each session has an app of its own: sessions of one app would share prefixes."""
    return f"session-{session}"


@dataclass(kw_only=True)
class Played:
    """What came of all conversations."""

    # Their turns as they ended; those that time cut off at last.
    asked: list[Asked] = field(default_factory=list)
    # Token ids from before the play, by app.
    pasts: dict[str, list[int]] = field(default_factory=dict)
    # From the first submission to the last answer's end, or until time was up.
    elapsed_ms: float = 0.0
    errors: list[str] = field(default_factory=list)  # one for each session that ended early

    @property
    def answered(self) -> dict[str, list[Asked]]:
        """Turns that were answered to their ends, in order, by app."""
        found: dict[str, list[Asked]] = {}
        for each in self.asked:
            if each.whole:
                found.setdefault(each.who, []).append(each)
        return found

    @property
    def num_output_tokens(self) -> int:
        """Of all answers."""
        return sum(len(each.reply.token_ids) for each in self.asked)

    @property
    def num_once_tokens(self) -> int:
        """Tokens to compute if none is computed twice: all but each session's very last."""
        once = {who: len(past) - 1 for who, past in self.pasts.items()}
        for each in self.asked:
            # The last token of an answer has no KV.
            known = each.num_tokens - bool(each.reply.token_ids)
            once[each.who] = max(once.get(each.who, 0), known)
        return sum(once.values())

    def outputs_sha256(self) -> str:
        """Of all whole answers, session by session and turn by turn."""
        digest = hashlib.sha256()
        for who, turns in sorted(self.answered.items()):
            digest.update(f"{who}:{[each.reply.token_ids for each in turns]}\n".encode())
        return digest.hexdigest()


class Play:
    """Conversations on one runtime. Owned by the thread that plays them.

    Each turn's prompt is all tokens so far and the turn's input, answered greedily with exactly as
    many tokens as the turn says; so the answers depend on nothing but the model.
    """

    def __init__(
        self,
        runtime: Runtime,
        conversations: Sequence[Talk],
        turn_done: Callable[[], None] = lambda: None,
    ) -> None:
        self._runtime = runtime
        self._conversations = conversations
        self._turn_done = turn_done
        self._text = TextIds(runtime.tokenizer)
        self._open: dict[int, Session] = {}  # from before the play
        self._driver = Driver()
        self.played = Played(asked=self._driver.asked)

    def recall(self, num_sessions: int | None = None) -> int:
        """Compute KV of what was said before, of all sessions or the first so many, in turn.

        Returns how many tokens that was.
        """
        for index, conversation in enumerate(self._conversations[:num_sessions]):
            if not conversation.num_past_tokens:
                continue
            session = self._open[index] = self._session(index)
            # The last of them is its answer.
            num_said = max(1, conversation.num_past_tokens - 1)
            ids = self._text.stretch(num_said, index * _TURNS_PER_SESSION + _PAST)
            self.played.pasts[app_name(index)] = [*ids, *answer(session, ids, 1).token_ids]
        return sum(map(len, self.played.pasts.values()))

    def run(
        self, *, num_busy: int | None = None, for_ms: float | None = None, tick: Tick | None = None
    ) -> Played:
        """Play all conversations to their ends, or until time is up.

        With `num_busy`, so many users play one conversation after the other without a pause,
        instead of each when its time has come.
        """
        users = (self._user(index) for index in range(len(self._conversations)))
        if num_busy is not None:
            queue = iter(range(len(self._conversations)))
            users = (self._busy_user(queue) for _ in range(num_busy))
        start_ms = self._driver.now_ms
        try:
            self._driver.run(users, for_ms=for_ms, tick=tick)
        finally:
            for session in self._open.values():
                session.close()
        if for_ms is None:
            start_ms = min((a.submitted_ms for a in self._driver.asked), default=start_ms)
        self.played.elapsed_ms = self._driver.now_ms - start_ms
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
        who = app_name(index)
        tokens = self.played.pasts.get(who, [])
        with self._open.pop(index, None) or self._session(index) as session:
            for number, turn in enumerate(self._conversations[index].turns):
                if pauses:
                    yield Pause(turn.think_ms)
                said = self._text.stretch(turn.input_tokens, index * _TURNS_PER_SESSION + number)
                tokens = [*tokens, *said]
                try:
                    reply = yield from self._driver.ask(who, session, tokens, turn.output_tokens)
                except EdgeKVError as error:
                    self.played.errors.append(f"{type(error).__name__}: {error}")
                    return
                self._turn_done()
                tokens = [*tokens, *reply.token_ids]


TIE_LOGITS = 1e-4  # closer than this, two tokens may change places with the shape of a step


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where a session's answers part."""

    prefix: tuple[int, ...]  # all tokens before, inputs included
    first: int  # the one run's next token
    second: int  # the other's


def differences(ours: Played, theirs: Played) -> list[Difference]:
    """One for each session whose answers differ; those that ended early are compared as far."""
    others = theirs.answered
    found = [_difference(turns, others.get(who, ())) for who, turns in ours.answered.items()]
    return [difference for difference in found if difference is not None]


def _difference(ours: Sequence[Asked], theirs: Sequence[Asked]) -> Difference | None:
    for mine, other in zip(ours, theirs, strict=False):
        tokens = zip(mine.reply.token_ids, other.reply.token_ids, strict=True)
        for at, (first, second) in enumerate(tokens):
            if first != second:
                prefix = (*mine.prompt, *mine.reply.token_ids[:at])
                return Difference(prefix=prefix, first=first, second=second)
    return None


def num_ties(runtime: Runtime, found: Sequence[Difference]) -> int:
    """How many differences are between two tokens that the model finds equally likely."""
    ties = 0
    for each in found:
        logits = runtime.logits(each.prefix)[-1]
        worst = min(float(logits[each.first]), float(logits[each.second]))
        ties += float(logits.max()) - worst <= TIE_LOGITS
    return ties
