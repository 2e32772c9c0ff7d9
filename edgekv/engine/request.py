"""One request while the engine works on it, the session that it is asked of, and what it says."""

import itertools
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from edgekv.config import PrefillMode, Priority, Sampling
from edgekv.engine.outbox import Failed, Finished, FinishReason, Outbox
from edgekv.engine.telling import Telling
from edgekv.errors import EdgeKVError
from edgekv.ids import RequestId, SessionId, new_request_id, new_session_id
from edgekv.kv.provenance import Span
from edgekv.kv.session_kv import SessionKV
from edgekv.metrics import Stats, percentile
from edgekv.predict.state import PredictedState
from edgekv.sched.plan import RequestState
from edgekv.tokenizer import IncrementalDetokenizer, StopMatcher
from edgekv.tokenizer.constraint import Constraint

ADMISSION_RESERVE_TOKENS = 256
# Tokens that a grammar forces and that are told at once: more would be a leap in what is read, and
# rows of a step in which others wait for their next token.
FORCED_MAX = 16


@dataclass(kw_only=True, eq=False)
class EngineSession:
    """A session's engine side: its KV and who may see it. Owned by the engine thread."""

    app: str  # who owns it
    session_id: SessionId = field(default_factory=new_session_id)
    store_name: str = ""  # its name in the store, unique within the app
    persistent: bool = False  # it outlives the process
    key: int | None = None  # its key in the store, once the store knows it
    kv: SessionKV = field(default_factory=SessionKV)  # its KV
    active: "Request | None" = None  # the request that it answers
    last_used_ms: float = 0.0  # when its last request ended
    asked: bool = False  # something was, once: the engine knows it; set by callers' threads
    closed: bool = False  # nobody will ask it again
    write_again_ms: float = 0.0  # after a failed write: when to try behind the decode again
    num_write_failures: int = 0  # times when what was on its way to disk did not get there
    num_restored: int = 0  # tokens that the last restore read
    restore_ms: float = 0.0  # what that took
    # While some of its KV is predicted, or an auxiliary's is kept for its next turn.
    predicted: PredictedState | None = None

    def __post_init__(self) -> None:
        if not self.store_name:
            # No name of a user begins with NUL.
            self.store_name = f"\0{self.session_id}"


@dataclass(kw_only=True, eq=False)
class Request:
    """Owned by its caller until submitted, by the engine thread from then on.

    `tokens` are prompt and answer; `pending` counts those that the step in flight samples, not yet
    known here. How many have KV is the session's to say, see `num_computed`.

    Of an evaluation (`logits` is given) the prompt's logits are wanted, of every row, and no token.

    Tokens of the answer beyond the first `num_confirmed` are provisional: they were sampled over
    predicted KV, and exact KV has not been asked yet.
    """

    session: EngineSession
    prompt_ids: list[int]
    sampling: Sampling
    detokenizer: IncrementalDetokenizer
    submitted_ms: float
    request_id: RequestId = field(default_factory=new_request_id)
    priority: Priority = "interactive"
    eos_ids: frozenset[int] = frozenset()
    stop_matcher: StopMatcher = field(default_factory=lambda: StopMatcher(()))
    constraint: Constraint | None = None  # which tokens may come next; its prompt is exact
    mask: Future[np.ndarray] | None = None  # of the next token, while it is being computed
    outbox: Outbox = field(default_factory=Outbox)
    shows_ahead: bool = False  # provisional text, to a reader who can take it back
    prefill_only: bool = False
    num_asked: int = 0  # tokens of the prompt in front of what opens the answer; 0: not known
    logits: np.ndarray | None = None  # (prompt, vocab) float32, filled row by row
    prefill: PrefillMode = "exact"
    predict: tuple[int, int] = (0, 0)  # tokens whose KV is predicted where it is not there
    row_share: float = 1.0  # see `RequestState`, and the next three
    rows_max: int = 1 << 30
    predicted_share: float = 1.0
    predicted_room: float = 1.0
    # How many tokens have to be exact for each time that it may be asked what comes next, while
    # some are not; and at which of these it is.
    askings: tuple[int, ...] = ()
    asking: int = 0
    looks: bool = False  # before it is asked what comes first, its last token looks where to look
    looked_at: tuple[Span, ...] = ()  # tokens that this one looks at most, see `predict.look`
    look: tuple[Span, ...] = ()  # tokens whose KV is to be computed although it is predicted
    warm_share: float = 1.0  # what a row costs whose lower layers have run; see `num_warm`
    approximate: bool = False  # some KV that it goes on with, or went on with, is predicted
    confirms: bool = True  # what is sampled over predicted KV is provisional
    num_confirmed: int = 0
    num_predicted: int = 0
    num_repaired: int = 0
    num_compared: int = 0
    num_agreed: int = 0
    tokens: list[int] = field(default_factory=list)
    num_cached: int = 0
    pending: int = 0
    admitted: bool = False
    arriving: bool = False  # admitted; its buffers or their contents are not there yet
    queued_ms: float = 0.0  # since when it waits to be admitted
    served_ms: float | None = None
    resident_ms: float = 0.0  # service since it was admitted last
    service_ms: float = 0.0  # service in all
    num_preemptions: int = 0
    num_restored: int = 0
    restore_ms: float = 0.0
    finish_reason: FinishReason | None = None
    failure: EdgeKVError | None = None  # why it could not go on
    kv_bytes: int = 0  # that its session owned when it ended
    num_rows_cut: int = 0  # that ended where the last KV is made, see `ExactPrefill`
    num_forced: int = 0  # of the answer's last tokens, which its grammar left no choice of
    num_forced_all: int = 0
    at_end: bool = False  # at a token that ends answers, or where its grammar does
    # Tokens that the repetition penalty knows of: (vocab,) bool on the device.
    seen: mx.array | None = None
    first_step_ms: float | None = None
    token_ms: list[float] = field(default_factory=list)  # when each of the answer's tokens came
    certain_min: float = float("inf")  # of what is shown ahead of exact KV, see `predict.gate`
    num_ahead_confirmed: int = 0  # of those that were provisional
    num_retracted: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)
        self.queued_ms = self.submitted_ms
        self.telling = Telling(
            self.outbox, self.detokenizer, self.stop_matcher, shows_ahead=self.shows_ahead
        )

    @property
    def num_computed(self) -> int:
        """Tokens that have KV in memory, or will when the step in flight ends."""
        kv = self.session.kv
        return kv.num_tokens if kv.resident else 0

    @property
    def num_generated(self) -> int:
        """Number of output tokens so far."""
        return len(self.tokens) - len(self.prompt_ids)

    @property
    def runs(self) -> bool:
        """Whether it is in memory, and nothing more is to be waited for."""
        return self.finish_reason is None and self.admitted and not self.arriving

    @property
    def has_begun(self) -> bool:
        """Whether its first token is known, or being sampled."""
        return self.num_generated + self.pending > 0

    def max_output(self, tokens_max: int) -> int:
        """Most output tokens, by the request and by what a session can hold."""
        room = tokens_max - len(self.prompt_ids)
        return min(room, self.sampling.max_tokens or room)

    def exhausted(self, tokens_max: int) -> bool:
        """Whether tokens known and being sampled already are all it may have."""
        if self.prefill_only:
            return self.num_computed >= len(self.prompt_ids)
        return self.num_generated + self.pending >= self.max_output(tokens_max)

    @property
    def reusable_max(self) -> int:
        """How many cached tokens are of use: all but the prompt's last, whose logits are needed."""
        return len(self.prompt_ids) - (not self.prefill_only)

    def best_donor(self, others: Iterable[EngineSession]) -> tuple[EngineSession | None, int]:
        """Of the sessions of its app the one with the longest usable prefix in memory."""
        best, best_prefix = None, 0
        if self.logits is not None:
            return None, 0  # its rows must all be computed
        wanted = self.prompt_ids[: self.reusable_max]
        for other in others:
            if other is self.session or other.app != self.session.app:
                continue
            prefix = other.kv.reusable_prefix(wanted)
            if prefix > best_prefix:
                best, best_prefix = other, prefix
        return best, best_prefix

    def state(self) -> RequestState:
        """This request as the scheduler sees it."""
        kv = self.session.kv
        # Perhaps on its way back still, for a request that was taken back.
        leaving = not self.admitted and kv.moving
        return RequestState(
            request_id=self.request_id,
            priority=self.priority,
            arrival_ms=self.submitted_ms,
            admitted=self.admitted,
            held_capacity=0 if leaving else kv.capacity,
            num_tokens=len(self.tokens) + self.pending,
            num_computed=self.num_computed,
            num_prompt=len(self.prompt_ids),
            reserve_tokens=min(ADMISSION_RESERVE_TOKENS, self.sampling.max_tokens or (1 << 30)),
            app=self.session.app,
            session_id=self.session.session_id,
            num_stored=0 if kv.resident else kv.num_tokens,
            arriving=self.arriving,
            leaving=leaving,
            queued_ms=self.queued_ms,
            served_ms=self.served_ms,
            resident_ms=self.resident_ms,
            service_ms=self.service_ms,
            row_share=self.warm_share if self.num_warm else self.row_share,
            # No rows of different cost in one step.
            rows_max=self.num_warm + self.num_look if self.num_warm else self.rows_max,
            cheap=self.predict,
            cheap_share=self.warm_share if self.num_look else self.predicted_share,
            cheap_room=1.0 if self.num_look else self.predicted_room,
            num_extra=self.num_look or self._num_behind,
            num_forced=self.num_forced,
        )

    @property
    def _num_behind(self) -> int:
        """Tokens that an auxiliary has to run before the first that is predicted."""
        state = self.session.predicted
        if state is None or not state.has_aux or self.num_computed >= self.predict[1]:
            return 0
        return max(0, self.predict[0] - state.side_end)

    @property
    def num_look(self) -> int:
        """Tokens in front whose KV is computed although it is predicted; see `predict.look`."""
        return sum(end - start for start, end in self.look) if self.session.predicted else 0

    @property
    def num_warm(self) -> int:
        """Next tokens whose lower layers have run: the hidden states behind these are kept."""
        state = self.session.predicted
        return 0 if state is None else max(0, state.kept_end - self.num_computed)

    # --- its tokens ---

    def ends_with(self, token: int) -> bool:
        """Whether a token is no part of the answer, but its end."""
        return token in self.eos_ids and not self.sampling.ignore_eos

    def append(self, token: int, now_ms: float) -> None:
        """The next token of the answer."""
        self.tokens.append(token)
        self.token_ms.append(now_ms)
        if self.constraint is not None:
            self.constraint.take(token)
            self.at_end = self.constraint.ended

    def follow(self, tokens_max: int, now_ms: float) -> list[int]:
        """Append the tokens that its grammar leaves no choice of, and return them.

        They need no sampling, and all become rows of the next step. Where their logprobs are wanted
        they are sampled like any other.
        """
        self.num_forced = 0
        if self.constraint is None or self.at_end or self.sampling.logprobs is not None:
            return []
        room = self.max_output(tokens_max) - self.num_generated
        forced = self.constraint.forced(min(room, FORCED_MAX))
        end = next((i for i, token in enumerate(forced) if self.ends_with(token)), None)
        forced = forced[:end]
        for token in forced:
            self.append(token, now_ms)
        self.at_end |= end is not None
        if forced:
            self.seen = None
        self.num_forced = len(forced)
        self.num_forced_all += len(forced)
        self.num_confirmed += self.confirms * len(forced)
        return forced

    def confirm(self, index: int, token: int | None) -> bool:
        """Whether exact KV says the same `index`-th token; if not, it and all behind it are gone.

        None is a token of which nothing is kept: one that ends the answer.
        """
        place = len(self.prompt_ids) + index
        assert self.num_confirmed == index < self.num_generated
        self.num_compared += 1
        if self.tokens[place] == token:
            self.num_agreed += 1
            self.num_confirmed += 1
            self.num_ahead_confirmed += 1
            return True
        self.num_retracted += self.num_generated - index
        del self.tokens[place:], self.token_ms[index:]
        self.seen = None
        return False

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between the answer's tokens."""
        return [after - before for before, after in itertools.pairwise(self.token_ms)]

    # --- what its caller is told ---

    def tell_end(self, now_ms: float) -> None:
        """Tell the last of the text, and why it ended."""
        if self.failure is not None:
            self.outbox.put(Failed(error=self.failure))
            return
        assert self.finish_reason is not None
        self.telling.end(now_ms)
        stop = self.telling.stop
        reason = self.finish_reason if stop is None else "stop"
        gaps_ms = tuple(self.gaps_ms[: max(0, self.telling.num_tokens - 1)])
        stats = self.stats(now_ms)
        self.outbox.put(Finished(finish_reason=reason, stats=stats, gaps_ms=gaps_ms, stop=stop))

    def stats(self, now_ms: float) -> Stats:
        """The figures of this request, ended or not."""
        first_step = now_ms if self.first_step_ms is None else self.first_step_ms
        first_token = self.token_ms[0] if self.token_ms else now_ms
        gaps_ms = self.gaps_ms
        decode_ms = sum(gaps_ms)
        telling = self.telling
        return Stats(
            ttft_ms=self._since_submitted(telling.first_visible_ms),
            ttft_confirmed_ms=self._since_submitted(telling.first_confirmed_ms),
            queue_ms=first_step - self.submitted_ms,
            prefill_ms=max(0.0, first_token - first_step),
            prefill_mode="predict" if self.approximate else "exact",
            num_prompt_tokens=len(self.prompt_ids),
            num_cached_tokens=self.num_cached,
            num_restored_tokens=self.num_restored,
            restore_ms=self.restore_ms,
            num_preemptions=self.num_preemptions,
            num_output_tokens=telling.num_tokens,
            decode_tokens_per_s=1e3 * len(gaps_ms) / decode_ms if decode_ms > 0 else 0.0,
            tbt_p50_ms=percentile(gaps_ms, 50),
            tbt_max_ms=max(gaps_ms, default=0.0),
            num_predicted_tokens=self.num_predicted,
            num_repaired_tokens=self.num_repaired,
            repair_agreement=self.num_agreed / self.num_compared if self.num_compared else None,
            num_confirmed_tokens=self.num_ahead_confirmed,
            num_retracted_tokens=self.num_retracted,
            num_forced_tokens=self.num_forced_all,
            num_rows_cut=self.num_rows_cut,
            kv_bytes=self.kv_bytes,
            peak_memory_bytes=mx.get_peak_memory(),
            sampling=self.sampling,
        )

    def _since_submitted(self, ms: float | None) -> float | None:
        return None if ms is None else ms - self.submitted_ms
