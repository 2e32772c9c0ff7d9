"""A conversation whose KV outlives its requests."""

import asyncio
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from edgekv.clock import Clock
from edgekv.config import PREFILL_MODES, PrefillMode, SamplingParams, check_choice, check_float
from edgekv.engine.engine import Engine
from edgekv.engine.outbox import Outbox
from edgekv.engine.request import EngineSession, Request
from edgekv.errors import (
    ConfigError,
    PromptEmpty,
    PromptTooLong,
    RequestTimeout,
    RuntimeClosed,
    SessionBusy,
)
from edgekv.ids import new_request_id, new_session_id
from edgekv.runtime.conversation import ChatMessage, Conversation
from edgekv.runtime.keeper import KeptSession
from edgekv.runtime.persistence import system_of, with_system
from edgekv.runtime.reply import AsyncReplyStream, Reply, ReplyStream, _Collector
from edgekv.tokenizer import StopMatcher, Tokenizer

if TYPE_CHECKING:
    from edgekv.runtime.app import App

DEFAULT_SAMPLING = SamplingParams()


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """The history a prompt was made from, and what it becomes with the reply."""

    before: Conversation
    after: Callable[[Reply], Conversation]


class Session:
    """A conversation of one app. Any thread may call it; it answers one request at a time."""

    def __init__(
        self,
        app: "App",
        name: str,
        *,
        conversation: Conversation,
        kept: KeptSession | None,
        engine: Engine,
        tokenizer: Tokenizer,
        tokens_max: int,
        clock: Clock,
        forget: Callable[["Session"], None],
        prefill: PrefillMode = "exact",
    ) -> None:
        self.prefill: PrefillMode | None = None  # of its requests that say nothing else
        self._default_prefill = prefill
        self.app = app
        self.name = name
        self._engine = engine
        self._tokenizer = tokenizer
        self._tokens_max = tokens_max
        self._clock = clock
        self._forget = forget
        self._kept = kept
        self._lock = threading.Lock()  # guards what follows
        self._conversation = conversation
        self._last_reply: Reply | None = None
        self._closed = False
        # Set once the last request's reply is recorded, or nobody is left to read it.
        self._over = threading.Event()
        self._over.set()
        if kept is None:
            self._kv = EngineSession(session_id=new_session_id(), app=app.name)
        else:
            self._kv = engine.kept_session(app.name, name, kept.key, kept.token_ids)

    @property
    def messages(self) -> list[ChatMessage]:
        """The conversation so far."""
        return list(self._conversation.messages)

    @property
    def system(self) -> str | None:
        """The system prompt, if there is one."""
        return system_of(self._conversation)

    @property
    def kept(self) -> bool:
        """Whether the conversation is stored, and found again by its name after a restart."""
        return self._kept is not None

    @property
    def warning(self) -> str:
        """What could not be read of a stored conversation or kept of this one; "" if all is well.

        One line, for the user. The session works on.
        """
        if self._kept is None or not self._kept.warning:
            return ""
        return f"session {self.name!r}: {self._kept.warning}"

    @property
    def last_reply(self) -> Reply | None:
        """The reply of the last request that ran, a cancelled one included."""
        return self._last_reply

    def respond(
        self,
        text: str,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        raw: bool = False,
        prefill: PrefillMode | None = None,
    ) -> Reply:
        """Answer `text` and wait for the whole answer.

        Args:
            text: What the user says.
            sampling: How tokens are chosen; greedy by default.
            timeout_s: Cancel the request after this many seconds.
            raw: `text` is the prompt as it is: no chat template, no history.
            prefill: Whether the prompt's KV is predicted; None does what the session, its app or
                the runtime does, "exact" if nobody asked for anything else.

        Raises:
            ConfigError: The runtime has no predictor.
            RequestError: The prompt is empty, too long, or the chat template refused it.
            SessionBusy: The session is answering another request.
            RequestTimeout: The time is over; `last_reply` holds what there was.
            CapacityError, RuntimeClosed, EngineFailed: See `edgekv.errors`.
        """
        stream = self.stream(text, sampling=sampling, timeout_s=timeout_s, raw=raw, prefill=prefill)
        with stream:
            for _ in stream:
                pass
        assert stream.reply is not None
        return stream.reply

    def stream(
        self,
        text: str,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        raw: bool = False,
        prefill: PrefillMode | None = None,
    ) -> ReplyStream:
        """Answer `text` piece by piece; arguments and errors as in `respond`."""
        _check_timeout(timeout_s)
        return ReplyStream(self._submit(text, sampling, raw, prefill), timeout_s)

    async def arespond(
        self,
        text: str,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        raw: bool = False,
        prefill: PrefillMode | None = None,
    ) -> Reply:
        """`respond` for asyncio; cancelling the task cancels the request."""
        _check_timeout(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                stream = await self.astream(text, sampling=sampling, raw=raw, prefill=prefill)
                async with stream:
                    async for _ in stream:
                        pass
        except TimeoutError:
            raise RequestTimeout(
                "the request did not end in time", hint="give it more time"
            ) from None
        assert stream.reply is not None
        return stream.reply

    async def astream(
        self,
        text: str,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        prefill: PrefillMode | None = None,
    ) -> AsyncReplyStream:
        """`stream` for asyncio: `async for delta in await session.astream(...)`."""
        # Encoding a long prompt takes milliseconds to seconds: not on the loop.
        collector = await asyncio.to_thread(self._submit, text, sampling, raw, prefill)
        return AsyncReplyStream(collector)

    def prewarm(self, text: str | None = None) -> None:
        """Compute the KV of the conversation so far, and of a next turn's beginning, ahead.

        Blocks until done. The next turn then starts with these tokens cached.

        Args:
            text: The beginning of what the user will say, if it is known.
        """
        conversation = self._conversation
        if text is None and not conversation.messages:
            return
        prompt = conversation.prompt(self._tokenizer, text)
        collector = self._start(prompt.ids, DEFAULT_SAMPLING, prefill_only=True)
        with ReplyStream(collector, None) as stream:
            stream.wait()

    def suspend(self) -> int:
        """Take the session's KV out of memory now; its next turn reads it back.

        The engine does so by itself when others need the memory. Blocks until it is on disk.

        Returns:
            Tokens whose KV is on disk; 0 without a store.

        Raises:
            SessionBusy: The session is answering a request.
            RuntimeClosed, EngineFailed: The engine has ended.
        """
        with self._lock:
            self._raise_if_busy()
        return self._engine.suspend(self._kv)

    def clear(self, *, system: str | None = None) -> None:
        """Start the conversation anew.

        Args:
            system: A new system prompt; None keeps the one there is.
        """
        with self._lock:
            self._raise_if_busy()
            self._become(with_system(self.system if system is None else system))
            self._last_reply = None

    def close(self) -> None:
        """End the session and free its KV; a running request is cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._forget(self)
        self._engine.close_session(self._kv)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _become(self, conversation: Conversation) -> None:
        """Take the next conversation; inside the lock, so that they are saved in this order.

        Once the session is closed its name may be another's, who saves for it.
        """
        self._conversation = conversation
        if self._kept is not None and not self._closed:
            self._kept.save(conversation)

    def _raise_if_busy(self) -> None:
        if self._closed:
            raise RuntimeClosed(f"session {self.name!r} was closed", hint="open another one")
        if not self._over.is_set():
            raise SessionBusy(
                f"session {self.name!r} is answering another request",
                hint="wait for it, cancel it, or use another session",
            )

    def _submit(
        self, text: str, sampling: SamplingParams | None, raw: bool, prefill: PrefillMode | None
    ) -> _Collector:
        sampling = sampling or DEFAULT_SAMPLING
        if not isinstance(text, str):
            raise ConfigError.of("text", text, "a string")
        if not text.strip():
            raise PromptEmpty("the prompt is empty", hint="say something")
        if raw:
            return self._start(tuple(self._tokenizer.encode(text)), sampling, prefill=prefill)
        conversation = self._conversation
        prompt = conversation.prompt(self._tokenizer, text)

        def after(reply: Reply) -> Conversation:
            spelled = self._tokenizer.decode(reply.token_ids, skip_special_tokens=False)
            ids = reply.token_ids if spelled == reply.text else None
            return conversation.after(text, prompt, reply.text, ids)

        turn = _Turn(before=conversation, after=after)
        return self._start(prompt.ids, sampling, turn, prefill=prefill)

    def submit_ids(
        self, token_ids: list[int], sampling: SamplingParams, *, prefill: PrefillMode | None = None
    ) -> ReplyStream:
        """Continue token ids as they are: no template, no history. For benchmarks and tests."""
        return ReplyStream(self._start(tuple(token_ids), sampling, prefill=prefill), None)

    def _start(
        self,
        ids: tuple[int, ...],
        sampling: SamplingParams,
        turn: "_Turn | None" = None,
        *,
        prefill_only: bool = False,
        prefill: PrefillMode | None = None,
    ) -> _Collector:
        self._check_length(ids)
        mode = self._prefill_mode(prefill)
        request = self._request(ids, sampling, prefill_only=prefill_only, prefill=mode)

        def record(reply: Reply) -> None:
            if prefill_only:
                return
            with self._lock:
                self._last_reply = reply
                # A turn taken back before its first token is a turn that was not made: asked
                # again, the question must not stand there twice.
                unmade = reply.finish_reason == "cancelled" and not reply.token_ids
                if turn is not None and not unmade:
                    self._become(turn.after(reply))

        over = threading.Event()
        collector = _Collector(
            request.outbox, lambda: self._engine.cancel(request.request_id), record, over
        )
        with self._lock:
            self._raise_if_busy()
            if turn is not None and turn.before is not self._conversation:
                raise SessionBusy(
                    f"session {self.name!r} was given another turn meanwhile",
                    hint="ask again: the prompt was made for an older history",
                )
            self._engine.submit(request)
            self._over = over
            if self._kept is not None:
                self._kept.touch()
        return collector

    def _prefill_mode(self, asked: PrefillMode | None) -> PrefillMode:
        """What a request does: as it says, or its session, its app, the runtime."""
        mode = asked or self.prefill or self.app.prefill or self._default_prefill
        check_choice("prefill", mode, PREFILL_MODES)
        if mode != "exact" and not self._engine.predicts:
            raise ConfigError(
                f"prefill is {mode!r}, and this runtime has no KV predictor",
                hint="open it with RuntimeConfig(prediction=PredictionOptions(predictor=...))",
            )
        return mode

    def _request(
        self,
        ids: tuple[int, ...],
        sampling: SamplingParams,
        *,
        prefill_only: bool,
        prefill: PrefillMode,
    ) -> Request:
        outbox = Outbox()
        outbox.prefill_progress = (0, len(ids))
        return Request(
            request_id=new_request_id(),
            session=self._kv,
            priority=self.app.priority,
            prompt_ids=list(ids),
            sampling=sampling,
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            eos_ids=self._tokenizer.eos_ids,
            detokenizer=self._tokenizer.detokenizer(),
            stop_matcher=StopMatcher(sampling.stop),
            outbox=outbox,
            submitted_ms=self._clock.now_ms(),
            prefill_only=prefill_only,
            prefill=prefill,
        )

    def _check_length(self, ids: tuple[int, ...]) -> None:
        if not ids:
            raise PromptEmpty("the prompt has no tokens", hint="say something")
        if len(ids) >= self._tokens_max:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; a session holds at most {self._tokens_max}, "
                "its answer included",
                hint="shorten it, start a new session, or open the runtime with a larger pool "
                "if the model's context allows more",
            )


def _check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None:
        check_float("timeout_s", timeout_s, 0.0, 1e7)
