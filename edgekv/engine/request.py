"""One request while the engine works on it, the session that it is asked of, and what it says."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from edgekv.config import PrefillMode, Priority, Sampling
from edgekv.engine.outbox import Delta, Failed, Finished, FinishReason, Outbox, TokenLogprobs
from edgekv.errors import EdgeKVError
from edgekv.ids import RequestId, SessionId, new_request_id, new_session_id
from edgekv.kv.session_kv import SessionKV
from edgekv.metrics import Stats, percentile
from edgekv.predict.state import PredictedState
from edgekv.sched.plan import RequestState
from edgekv.tokenizer import IncrementalDetokenizer, StopMatcher

ADMISSION_RESERVE_TOKENS = 256


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
    outbox: Outbox = field(default_factory=Outbox)
    prefill_only: bool = False
    logits: np.ndarray | None = None  # (prompt, vocab) float32, filled row by row
    prefill: PrefillMode = "exact"
    predict: tuple[int, int] = (0, 0)  # tokens whose KV is predicted where it is not there
    row_share: float = 1.0  # see `RequestState`, and the next two
    rows_max: int = 1 << 30
    predicted_share: float = 1.0
    approximate: bool = False  # some KV that it goes on with is predicted
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
    at_eos: bool = False
    at_stop: bool = False  # a stop string was found in the text
    # Tokens that the repetition penalty knows of: (vocab,) bool on the device.
    seen: mx.array | None = None
    unsent_ids: list[int] = field(default_factory=list)
    unsent_logprobs: list[TokenLogprobs] = field(default_factory=list)
    first_step_ms: float | None = None
    first_token_ms: float | None = None
    first_visible_ms: float | None = None
    last_token_ms: float | None = None
    gaps_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)
        self.queued_ms = self.submitted_ms

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

    def usable(self, prefix: int) -> int:
        """All cached tokens but the last, whose logits are needed for the first new one."""
        return prefix if self.prefill_only else min(prefix, len(self.prompt_ids) - 1)

    def best_donor(self, others: Iterable[EngineSession]) -> tuple[EngineSession | None, int]:
        """Of the sessions of its app the one with the longest usable prefix in memory."""
        best, best_prefix = None, 0
        if self.logits is not None:
            return None, 0  # its rows must all be computed
        for other in others:
            if other is self.session or other.app != self.session.app:
                continue
            prefix = self.usable(other.kv.reusable_prefix(self.tokens))
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
            row_share=self.row_share,
            rows_max=self.rows_max,
            cheap=self.predict,
            cheap_share=self.predicted_share,
            num_extra=self._num_behind,
        )

    @property
    def _num_behind(self) -> int:
        """Tokens that an auxiliary has to run before the first that is predicted."""
        state = self.session.predicted
        if state is None or not state.has_aux or self.num_computed >= self.predict[1]:
            return 0
        return max(0, self.predict[0] - state.side_end)

    def note_token(self, now_ms: float) -> None:
        """Time one output token."""
        if self.first_token_ms is None:
            self.first_token_ms = now_ms
        if self.last_token_ms is not None:
            self.gaps_ms.append(now_ms - self.last_token_ms)
        self.last_token_ms = now_ms

    # --- what its caller is told ---

    def tell(self, token: int, logprobs: TokenLogprobs | None, now_ms: float) -> bool:
        """Tell what a token completes; True if that ends with a stop string."""
        assert not self.at_stop
        self.unsent_ids.append(token)
        if logprobs is not None:
            self.unsent_logprobs.append(logprobs)
        text, stop = self.stop_matcher.push(self.detokenizer.push(token))
        self.at_stop = stop is not None
        if text or self.unsent_logprobs:
            self._put(text, now_ms)
        return self.at_stop

    def tell_end(self, now_ms: float) -> None:
        """Tell the last of the text, and why it ended."""
        if self.failure is not None:
            self.outbox.put(Failed(error=self.failure))
            return
        reason = self.finish_reason
        assert reason is not None
        if self.at_stop:
            reason = "stop"
        else:
            text, stop = self.stop_matcher.push(self.detokenizer.flush())
            text += "" if stop else self.stop_matcher.flush()
            reason = "stop" if stop else reason
            if text or self.unsent_ids:
                self._put(text, now_ms)
        self.outbox.put(
            Finished(finish_reason=reason, stats=self.stats(now_ms), gaps_ms=tuple(self.gaps_ms))
        )

    def _put(self, text: str, now_ms: float) -> None:
        if text and self.first_visible_ms is None:
            self.first_visible_ms = now_ms
        ids, logprobs = tuple(self.unsent_ids), tuple(self.unsent_logprobs)
        self.unsent_ids.clear()
        self.unsent_logprobs.clear()
        self.outbox.put(Delta(text=text, token_ids=ids, logprobs=logprobs))

    def stats(self, now_ms: float) -> Stats:
        """The figures of this request, ended or not."""
        first_step = now_ms if self.first_step_ms is None else self.first_step_ms
        first_token = now_ms if self.first_token_ms is None else self.first_token_ms
        decode_ms = sum(self.gaps_ms)
        visible = self.first_visible_ms
        return Stats(
            ttft_ms=None if visible is None else visible - self.submitted_ms,
            queue_ms=first_step - self.submitted_ms,
            prefill_ms=max(0.0, first_token - first_step),
            prefill_mode="predict" if self.approximate else "exact",
            num_prompt_tokens=len(self.prompt_ids),
            num_cached_tokens=self.num_cached,
            num_restored_tokens=self.num_restored,
            restore_ms=self.restore_ms,
            num_preemptions=self.num_preemptions,
            num_output_tokens=self.num_generated,
            decode_tokens_per_s=1e3 * len(self.gaps_ms) / decode_ms if decode_ms > 0 else 0.0,
            tbt_p50_ms=percentile(self.gaps_ms, 50),
            tbt_max_ms=max(self.gaps_ms, default=0.0),
            num_predicted_tokens=self.num_predicted,
            num_repaired_tokens=self.num_repaired,
            repair_agreement=self.num_agreed / self.num_compared if self.num_compared else None,
            peak_memory_bytes=mx.get_peak_memory(),
            sampling=self.sampling,
        )
