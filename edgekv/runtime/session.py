"""A conversation whose KV outlives its requests."""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self, TypedDict, Unpack

from edgekv.config import PREFILL_MODES, PrefillMode, SamplingParams, check_choice, check_float
from edgekv.engine.outbox import Outbox
from edgekv.engine.request import EngineSession, Request
from edgekv.errors import (
    FETCH_AGAIN,
    ConfigError,
    EdgeKVError,
    PromptEmpty,
    PromptTooLong,
    RequestError,
    RequestTimeout,
    RuntimeClosed,
    SessionBusy,
)
from edgekv.runtime.conversation import ChatMessage, Conversation, Prompt
from edgekv.runtime.keeper import KeptSession
from edgekv.runtime.reply import AsyncReplyStream, Reply, ReplyStream, RunningReply
from edgekv.tokenizer import StopMatcher

if TYPE_CHECKING:
    from edgekv.runtime.runtime import App

AS_MEANT = SamplingParams()  # nothing is said: as the model's makers mean it


class AskOptions(TypedDict, total=False):
    """How one request is asked, where it is not as usual.

    Attributes:
        sampling: How tokens are chosen, where not as the model's makers say.
        raw: The text is the prompt as it is: no chat template, no history.
        prefill: Whether the prompt's KV is predicted; None does what the session, its app or
            the runtime does, "exact" if nobody asked for anything else.
    """

    sampling: SamplingParams | None
    raw: bool
    prefill: PrefillMode | None


class _Turn(NamedTuple):
    """What is said, and the history that its prompt was made from."""

    text: str
    before: Conversation
    prompt: Prompt


class Session:
    """A conversation of one app. Any thread may call it; it answers one request at a time.

    Attributes:
        app: Whose it is.
        name: Its name within the app.
        prefill: Whether its prompts' KV is predicted, where the request does not say.
    """

    def __init__(
        self, app: "App", name: str, conversation: Conversation, kept: KeptSession | None
    ) -> None:
        self.app = app
        self.name = name
        self.prefill: PrefillMode | None = None
        self._runtime = app._runtime
        self._tokenizer = app._runtime.tokenizer
        self._engine = app._runtime._engine
        self._kept = kept
        self._lock = threading.Lock()  # guards what follows
        self._conversation = conversation
        self._last_reply: Reply | None = None
        self._running: RunningReply | None = None  # the last request
        self._closed = False
        if kept is None:
            self._kv = EngineSession(app=app.name)
        else:
            self._kv = self._engine.kept_session(app.name, name, kept.key, kept.token_ids)

    @property
    def messages(self) -> list[ChatMessage]:
        """The conversation so far."""
        self._settle()
        return list(self._conversation.messages)

    @property
    def system(self) -> str | None:
        """The system prompt, if there is one."""
        return self._conversation.system

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
        self._settle()
        return self._last_reply

    def respond(
        self, text: str, *, timeout_s: float | None = None, **options: Unpack[AskOptions]
    ) -> Reply:
        """Answer `text` and wait for the whole answer.

        Args:
            text: What the user says.
            timeout_s: Cancel the request after this many seconds.
            options: `sampling`, `raw` and `prefill`; see `AskOptions`.

        Raises:
            ConfigError: The runtime has no predictor.
            RequestError: The prompt is empty, too long, or the chat template refused it.
            SessionBusy: The session is answering another request.
            RequestTimeout: The time is over; `last_reply` holds what there was.
            CapacityError, RuntimeClosed, EngineFailed: See `edgekv.errors`.
        """
        with self.stream(text, timeout_s=timeout_s, **options) as stream:
            for _ in stream:
                pass
        assert stream.reply is not None
        return stream.reply

    def stream(
        self, text: str, *, timeout_s: float | None = None, **options: Unpack[AskOptions]
    ) -> ReplyStream:
        """Answer `text` piece by piece; arguments and errors as in `respond`.

        Leaving the loop, closing or dropping the stream takes the request back; what there was of
        the answer stays in the conversation.
        """
        _check_timeout(timeout_s)
        return ReplyStream(self._submit(text, **options), timeout_s)

    async def arespond(
        self, text: str, *, timeout_s: float | None = None, **options: Unpack[AskOptions]
    ) -> Reply:
        """`respond` for asyncio; cancelling the task cancels the request."""
        _check_timeout(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                stream = await self.astream(text, **options)
                async with stream:
                    async for _ in stream:
                        pass
        except TimeoutError:
            raise RequestTimeout(
                "the request did not end in time", hint="give it more time"
            ) from None
        assert stream.reply is not None
        return stream.reply

    async def astream(self, text: str, **options: Unpack[AskOptions]) -> AsyncReplyStream:
        """`stream` for asyncio: `async for delta in await session.astream(...)`."""

        def begin() -> AsyncReplyStream:
            return AsyncReplyStream(self._submit(text, **options))

        # Encoding a long prompt takes milliseconds to seconds: not on the loop.
        beginning = asyncio.ensure_future(asyncio.to_thread(begin))
        try:
            return await asyncio.shield(beginning)
        except asyncio.CancelledError:
            # The thread goes on all the same; who asks again must not meet what it submits.
            with contextlib.suppress(EdgeKVError):
                await (await beginning).aclose()
            raise

    def prewarm(self, text: str | None = None) -> None:
        """Compute the KV of the conversation so far, and of a next turn's beginning, ahead.

        Blocks until done. The next turn then starts with these tokens cached.

        Args:
            text: The beginning of what the user will say, if it is known.
        """
        self._settle()
        conversation = self._conversation
        if text is None and not conversation.messages:
            return
        prompt = self._prompt(conversation, text)
        running = self._start(prompt.ids, AS_MEANT, prefill_only=True)
        with ReplyStream(running, None) as stream:
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
        self._settle()
        with self._lock:
            self._raise_if_busy()
        return self._engine.suspend(self._kv)

    def clear(self, *, system: str | None = None) -> None:
        """Start the conversation anew.

        Args:
            system: A new system prompt; None keeps the one there is.
        """
        check_system(system)
        self._settle()
        with self._lock:
            self._raise_if_busy()
            self._become(Conversation.begin(self.system if system is None else system))
            self._last_reply = None
        self._save()

    def close(self) -> None:
        """End the session and free its KV; a running request is cancelled."""
        self._settle()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # Inside the lock: who sees it closed and opens another one of its name, whose KV may
            # be the same, cannot ask that one before the engine hears of this end.
            self._engine.close_session(self._kv)
        self._runtime._forget_session(self)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        with self._lock:
            return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _settle(self) -> None:
        """Take in the end of a request whose stream was dropped: what there was is a turn, too."""
        running = self._running
        if running is not None and running.dropped:
            running.finish()

    def _become(self, conversation: Conversation) -> None:
        """Take the next conversation; inside the lock, so that they are noted in this order.

        Once the session is closed its name may be another's, who saves for it.
        """
        before, self._conversation = self._conversation, conversation
        if self._kept is not None and not self._closed:
            self._kept.note(conversation, before)

    def _save(self) -> None:
        """Have on disk what was noted; outside the lock, for it waits for the disk."""
        if self._kept is not None:
            self._kept.save()

    def _raise_if_busy(self) -> None:
        self._runtime._raise_if_closed()
        if self._closed:
            raise RuntimeClosed(f"session {self.name!r} was closed", hint="open another one")
        if self._running is not None and not self._running.done:
            raise SessionBusy(
                f"session {self.name!r} is answering another request",
                hint="wait for it, cancel it, or use another session",
            )

    def _submit(
        self,
        text: str,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        prefill: PrefillMode | None = None,
    ) -> RunningReply:
        sampling = sampling or AS_MEANT
        if not isinstance(text, str):
            raise ConfigError.of("text", text, "a string")
        if not text.strip():
            raise PromptEmpty("the prompt is empty", hint="say something")
        self._settle()
        if raw:
            return self._start(self._tokenizer.encode(text), sampling, prefill=prefill)
        conversation = self._conversation
        prompt = self._prompt(conversation, text)
        turn = _Turn(text=text, before=conversation, prompt=prompt)
        return self._start(prompt.ids, sampling, turn, prefill=prefill)

    def submit_ids(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        prefill: PrefillMode | None = None,
    ) -> ReplyStream:
        """Continue token ids as they are: no template, no history. For benchmarks and tests.

        Raises:
            ConfigError: One is no id of the model's.
        """
        ids = self._runtime._checked_ids(token_ids)
        self._settle()
        return ReplyStream(self._start(ids, sampling, prefill=prefill), None)

    def _start(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        turn: _Turn | None = None,
        *,
        prefill_only: bool = False,
        prefill: PrefillMode | None = None,
    ) -> RunningReply:
        self._check_prompt(ids)
        request = self._request(ids, sampling, self._prefill_mode(prefill))
        request.prefill_only = prefill_only

        running = RunningReply(
            request.outbox,
            lambda: self._engine.cancel(request.request_id),
            lambda reply: None if prefill_only else self._take_in(reply, turn),
        )
        with self._lock:
            self._raise_if_busy()
            if turn is not None and turn.before is not self._conversation:
                raise SessionBusy(
                    f"session {self.name!r} was given another turn meanwhile",
                    hint="ask again: the prompt was made for an older history",
                )
            self._engine.submit(request)
            self._running = running
            if self._kept is not None:
                self._kept.touch()
        return running

    def _prompt(self, conversation: Conversation, text: str | None) -> Prompt:
        prompt = conversation.prompt(self._tokenizer, text)
        self._runtime._warn_of_plain_form()
        return prompt

    def _take_in(self, reply: Reply, turn: _Turn | None) -> None:
        with self._lock:
            self._last_reply = reply
            # A turn taken back before its first token is a turn that was not made: asked
            # again, the question must not stand there twice.
            unmade = reply.finish_reason == "cancelled" and not reply.token_ids
            if turn is not None and not unmade:
                ids, said = reply.token_ids, None
                if self._tokenizer.decode(ids, skip_special_tokens=False) == reply.text:
                    said = Prompt(text=self._tokenizer.spell(ids), ids=tuple(ids))
                self._become(turn.before.after(turn.text, turn.prompt, reply.text, said))
        self._save()

    def _prefill_mode(self, asked: PrefillMode | None) -> PrefillMode:
        """What a request does: as it says, or its session, its app, the runtime."""
        usual = self._runtime.config.prediction.prefill
        mode = asked or self.prefill or self.app.prefill or usual
        check_choice("prefill", mode, PREFILL_MODES)
        if mode != "exact" and not self._engine.predicts:
            raise ConfigError(
                f"prefill is {mode!r}, and this runtime has no KV predictor",
                hint="open it with RuntimeConfig(prediction=PredictionOptions(predictor=...))",
            )
        return mode

    def _request(
        self, ids: Sequence[int], sampling: SamplingParams, prefill: PrefillMode
    ) -> Request:
        outbox = Outbox()
        outbox.prefill_progress = (0, len(ids))
        return Request(
            session=self._kv,
            priority=self.app.priority,
            prompt_ids=list(ids),
            sampling=sampling.over(self._tokenizer.sampling),
            eos_ids=self._tokenizer.eos_ids,
            detokenizer=self._tokenizer.detokenizer(),
            stop_matcher=StopMatcher(sampling.stop),
            outbox=outbox,
            submitted_ms=self._runtime._clock.now_ms(),
            prefill=prefill,
        )

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not ids:
            raise PromptEmpty("the prompt has no tokens", hint="say something")
        tokens_max = self._runtime.context_max
        if len(ids) >= tokens_max:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; a session holds at most {tokens_max}, "
                "its answer included",
                hint="shorten it, start a new session, or open the runtime with a larger pool "
                "if the model's context allows more",
            )
        if max(ids) >= self._runtime._vocab_size:
            raise RequestError(
                f"the prompt has token {max(ids)}; the model knows {self._runtime._vocab_size}",
                hint=f"the tokenizer is another model's: {FETCH_AGAIN}",
            )


def check_system(system: object) -> None:
    """Make sure that a system prompt is Unicode text, or None.

    Raises:
        ConfigError: It is not, and every request would fail.
    """
    if system is None:
        return
    if not isinstance(system, str) or any("\ud800" <= char <= "\udfff" for char in system):
        raise ConfigError.of("system", system, "Unicode text or None")


def _check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None:
        check_float("timeout_s", timeout_s, 0.0, 1e7)
