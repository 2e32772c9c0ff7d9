"""A conversation whose KV outlives its requests."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar, Unpack, overload

from edgekv.chat.functions import Tools
from edgekv.chat.said import Said, messages_of
from edgekv.chat.values import ChatMessage, Completion
from edgekv.config import (
    PREFILL_MODES,
    PrefillMode,
    Priority,
    SamplingParams,
    check_choice,
    check_kind,
)
from edgekv.errors import ConfigError, PromptEmpty
from edgekv.runtime.answers import (
    TOOL_ROUNDS_MAX,
    AnswerStream,
    AsyncAnswerStream,
    Rounds,
    Schema,
    Toolbox,
)
from edgekv.runtime.reply import (
    AsyncReplyStream,
    Reply,
    ReplyStream,
    RunningReply,
    check_timeout,
    in_thread,
    in_time,
)
from edgekv.runtime.talk import Ask, Talk, closed_error
from edgekv.tokenizer.grammar import Grammar

if TYPE_CHECKING:
    from edgekv.runtime.app import App
    from edgekv.runtime.completions import Begins

T = TypeVar("T")
AS_MEANT = SamplingParams()  # nothing is said: as the model's makers mean it


class AskOptions(TypedDict, total=False):
    """How one request is asked, where it is not as usual.

    Attributes:
        sampling: How tokens are chosen, where not as the model's makers say.
        raw: The text is the prompt as it is: no chat template, no history.
        prefill: Whether the prompt's KV is predicted; None does what the session, its app or
            the runtime does, "exact" if nobody asked for anything else.
        confirmed: No delta is provisional: whoever reads cannot take text back. `respond` reads so.
        grammar: What the answer's text must match, unless its length cuts it. Its prompt's KV is
            never predicted: a token that exact KV corrects would take its grammar's state back.
    """

    sampling: SamplingParams | None
    raw: bool
    prefill: PrefillMode | None
    confirmed: bool
    grammar: Grammar | None


class RespondOptions(AskOptions, Toolbox, total=False):
    """How one request is asked, and what the model may call.

    With tools, a schema or messages nothing is `raw`, and everything is confirmed.
    """


class Session:
    """A conversation of one app. Any thread may call it; it answers one request at a time.

    Several may be open under one name, one for each `App.session`: they share what is said and its
    KV. Each is closed by itself; the conversation leaves memory when the last one is, or was
    dropped by its owner.

    Attributes:
        app: Whose it is.
        name: Its name within the app.
        prefill: Whether its prompts' KV is predicted, where the request does not say.
    """

    def __init__(self, app: "App", talk: Talk) -> None:
        self.app = app
        self.name = talk.name
        self.prefill: PrefillMode | None = None
        self._runtime = app._runtime
        self._tokenizer = app._runtime.tokenizer
        self._talk = talk
        self._running: RunningReply | None = None  # the last request that it asked
        self._closed = False

    @property
    def messages(self) -> list[ChatMessage]:
        """The conversation so far."""
        self._talk.settle()
        return list(self._talk.conversation.messages)

    @property
    def system(self) -> str | None:
        """The system prompt, if there is one."""
        return self._talk.conversation.system

    @property
    def kept(self) -> bool:
        """Whether the conversation is stored, and found again by its name after a restart."""
        return self._talk.kept is not None and self._talk.kept.found_again

    @property
    def warning(self) -> str:
        """What could not be read of a stored conversation or kept of this one; "" if all is well.

        One line, for the user. The session works on.
        """
        kept = self._talk.kept
        if kept is None or not kept.warning:
            return ""
        return f"session {self.name!r}: {kept.warning}"

    @property
    def last_reply(self) -> Reply | None:
        """The reply of the last request that ran, a cancelled one included."""
        self._talk.settle()
        return self._talk.last_reply

    @overload
    def respond(
        self,
        text: Said,
        *,
        schema: type[T],
        timeout_s: float | None = None,
        **options: Unpack[RespondOptions],
    ) -> Reply[T]: ...
    @overload
    def respond(
        self,
        text: Said,
        *,
        schema: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[RespondOptions],
    ) -> Reply[Any]: ...
    def respond(
        self,
        text: Said,
        *,
        schema: Schema[Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[RespondOptions],
    ) -> Reply[Any]:
        """Answer `text` and wait for the whole answer.

            reply = session.respond("Weather in Bern?", schema=Weather, tools=[look_up])
            print(reply.value.celsius)

        Args:
            text: What the user says; or messages, as dicts or `ChatMessage` values: results of
                calls that the reply before wanted, `[call.result("18 °C")]`.
            schema: What the answer must be: a pydantic model, a dataclass or another type that
                pydantic reads, or a JSON schema as a dict. The reply's `value` is one. The model is
                not told of it: say in the text what is wanted.
            timeout_s: Cancel the request after this many seconds, 0 to 1,000,000; with functions
                it is the time of all requests, and a function that runs is not interrupted.
            options: See `RespondOptions`.

        Raises:
            ConfigError: An argument is not what it should be, or the runtime has no predictor.
            RequestError: The prompt is empty, too long, or the chat template refused it; or a
                GrammarError, when it is asked or, where no token can go on by the grammar, later.
            AnswerInvalid: The answer was cut before it was what `schema` says, or is something
                that the type refuses though its schema does not.
            SessionBusy: The session is answering another request, or was given another turn while
                functions ran.
            RequestTimeout: The time is over; `last_reply` holds what there was.
            RuntimeClosed: The runtime, the app or the session was closed, or is meanwhile by
                another thread; the same.
            CapacityError, EngineFailed: See `edgekv.errors`.
        """
        asked: dict[str, Any] = {"confirmed": True, **options}
        with self.stream(text, schema=schema, timeout_s=timeout_s, **asked) as stream:
            for _ in stream:
                pass
        return self._whole(stream.reply)

    @overload  # a text alone is this one
    def stream(  # type: ignore[overload-overlap]
        self, text: str, *, timeout_s: float | None = None, **options: Unpack[AskOptions]
    ) -> ReplyStream: ...
    @overload
    def stream(
        self,
        text: Said,
        *,
        schema: type[T],
        timeout_s: float | None = None,
        **options: Unpack[RespondOptions],
    ) -> AnswerStream[T]: ...
    @overload
    def stream(
        self,
        text: Said,
        *,
        schema: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[RespondOptions],
    ) -> AnswerStream[Any]: ...
    def stream(
        self,
        text: Said,
        *,
        schema: Schema[Any] | None = None,
        timeout_s: float | None = None,
        tools: Tools | None = None,
        tool_rounds_max: int = TOOL_ROUNDS_MAX,
        **options: Unpack[AskOptions],
    ) -> ReplyStream | AnswerStream[Any]:
        """Answer `text` piece by piece; arguments and errors as in `respond`.

        Text that is answered with text alone comes in deltas. With tools, a schema or messages it
        is events, see `edgekv.chat.events`: what the model says is in those that are `TextDelta`.

        Leaving the loop, closing or dropping the stream takes the request back; what there was of
        the answer stays in the conversation. Where another thread closes the session or its app,
        the loop ends, and the reply is "cancelled".
        """
        check_timeout(timeout_s)
        if isinstance(text, str) and schema is None and tools is None:
            return ReplyStream(self._submit(text, **options), self, timeout_s=timeout_s)
        asked = self._asked(text, **options)
        rounds = Rounds(asked, schema=schema, tools=tools, tool_rounds_max=tool_rounds_max)
        return AnswerStream(rounds, self._begin, timeout_s)

    @overload
    async def arespond(
        self,
        text: Said,
        *,
        schema: type[T],
        timeout_s: float | None = None,
        **options: Unpack[RespondOptions],
    ) -> Reply[T]: ...
    @overload
    async def arespond(
        self,
        text: Said,
        *,
        schema: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[RespondOptions],
    ) -> Reply[Any]: ...
    async def arespond(
        self,
        text: Said,
        *,
        schema: Schema[Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[RespondOptions],
    ) -> Reply[Any]:
        """`respond` for asyncio; cancelling the task cancels the request.

        Functions that are async are awaited, others run on a thread.
        """
        check_timeout(timeout_s)
        asked: dict[str, Any] = {"confirmed": True, **options}
        async with in_time(timeout_s):
            stream = await self.astream(text, schema=schema, **asked)
            async with stream:
                async for _ in stream:
                    pass
        return self._whole(stream.reply)

    @overload  # see `stream`
    async def astream(  # type: ignore[overload-overlap]
        self, text: str, **options: Unpack[AskOptions]
    ) -> AsyncReplyStream: ...
    @overload
    async def astream(
        self, text: Said, *, schema: type[T], **options: Unpack[RespondOptions]
    ) -> AsyncAnswerStream[T]: ...
    @overload
    async def astream(
        self,
        text: Said,
        *,
        schema: Mapping[str, Any] | None = None,
        **options: Unpack[RespondOptions],
    ) -> AsyncAnswerStream[Any]: ...
    async def astream(
        self,
        text: Said,
        *,
        schema: Schema[Any] | None = None,
        tools: Tools | None = None,
        tool_rounds_max: int = TOOL_ROUNDS_MAX,
        **options: Unpack[AskOptions],
    ) -> AsyncReplyStream | AsyncAnswerStream[Any]:
        """`stream` for asyncio: `async for delta in await session.astream(...)`."""
        if not isinstance(text, str) or schema is not None or tools is not None:
            asked = self._asked(text, **options)
            rounds = Rounds(asked, schema=schema, tools=tools, tool_rounds_max=tool_rounds_max)
            return await AsyncAnswerStream.open(rounds, self._begin)
        plain, begun = text, list[AsyncReplyStream]()

        def begin() -> None:
            begun.append(AsyncReplyStream(self._submit(plain, **options), self))

        try:
            await in_thread(begin)  # encoding a long prompt takes milliseconds to seconds
        except asyncio.CancelledError:
            for stream in begun:
                await stream.aclose()
            raise
        return begun[0]

    def prewarm(self, text: str | None = None) -> None:
        """Compute the KV of the conversation so far, and of a next turn's beginning, ahead.

        Blocks until done. The next turn then starts with these tokens cached. Errors as in
        `respond`.

        Args:
            text: The beginning of what the user will say, if it is known.
        """
        running = self._begin_prewarm(text)
        if running is None:
            return
        with ReplyStream(running, self) as stream:
            stream.wait()
        self._whole(stream.reply)

    async def aprewarm(self, text: str | None = None) -> None:
        """`prewarm` for asyncio; cancelling the task cancels the request."""
        running = await in_thread(lambda: self._begin_prewarm(text))
        if running is None:
            return
        async with AsyncReplyStream(running, self) as stream:
            async for _ in stream:
                pass
        self._whole(stream.reply)

    def _begin_prewarm(self, text: str | None) -> RunningReply | None:
        """Ask it; None if there is nothing to compute."""
        self._check_open()
        if text is not None:
            check_kind("text", text, str, allowed="a string or None")
        self._talk.settle()
        if text is None and not self._talk.conversation.messages:
            return None
        ids = self._talk.prompt(text).ids
        ask = Ask(ids, AS_MEANT, self._prefill_mode(None), prefill_only=True)
        return self._start(ask)

    def suspend(self) -> int:
        """Take the session's KV out of memory now; its next turn reads it back.

        The engine does so by itself when others need the memory. Blocks until it is on disk.

        Returns:
            Tokens whose KV is on disk; 0 without a store.

        Raises:
            SessionBusy: The session is answering a request.
            RuntimeClosed, EngineFailed: The engine has ended.
        """
        self._check_open()
        return self._talk.suspend()

    def clear(self, *, system: str | None = None) -> None:
        """Start the conversation anew.

        Args:
            system: A new system prompt; None keeps the one there is.

        Raises:
            ConfigError: `system` is no Unicode text.
            SessionBusy: The session is answering a request.
            RuntimeClosed: It was closed.
        """
        self._check_open()
        check_system(system)
        self._talk.clear(system)

    def close(self) -> None:
        """End the session, and take back what it asked: what there was of an answer is kept.

        Waits until the engine has let go of that request. The KV leaves memory once no other
        session is open under this name.

        Raises:
            ForkedProcess: The session is a parent process's.
        """
        self._runtime._home.check()
        if self._closed:
            return
        self._closed = True
        if self._running is not None:
            self._running.finish()
        self._talk.settle()  # what a namesake asked that was dropped is part of what was said, too
        self._runtime._leave_talk(self)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed or self._talk.ended

    @property
    def busy(self) -> bool:
        """Whether it is answering, for one of those that have it open."""
        running = self._talk.running
        return running is not None and not (running.done or running.taken_back)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None or self._runtime._home.is_here:  # a child that exits does no harm here
            self.close()

    def _check_open(self) -> None:
        self._runtime._check_open()
        if self.closed:
            raise closed_error(self.name)

    def _asked(
        self,
        text: Said,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        prefill: PrefillMode | None = None,
        confirmed: bool = True,
        grammar: Grammar | None = None,
    ) -> Completion:
        """The conversation and what is said now, as a completion of it."""
        self._check_open()
        said = messages_of(text, "text")
        check_kind("confirmed", confirmed, bool, allowed="True or False")
        if raw is not False:
            raise ConfigError.of("raw", raw, "False with tools, a schema or messages")
        if grammar is not None:
            check_kind("grammar", grammar, Grammar, allowed="a Grammar or None")
        return Completion(
            messages=(*self.messages, *said),
            grammar=grammar,
            sampling=_check_sampling(sampling),
            prefill=prefill,
        )

    def _begin(self, asked: Completion) -> "Begins":
        """Ask a completion that goes on with this conversation."""
        return self._runtime._completions.go_on(self, asked)

    def _submit(
        self,
        text: str,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        prefill: PrefillMode | None = None,
        confirmed: bool = False,
        grammar: Grammar | None = None,
    ) -> RunningReply:
        self._check_open()
        check_kind("text", text, str, allowed="a string")
        sampling = _check_sampling(sampling)
        check_kind("raw", raw, bool, allowed="True or False")
        check_kind("confirmed", confirmed, bool, allowed="True or False")
        if grammar is not None:
            check_kind("grammar", grammar, Grammar, allowed="a Grammar or None")
        mode = self._prefill_mode(prefill)
        if not text.strip():
            raise PromptEmpty("the prompt is empty", hint="say something")
        self._talk.settle()
        if raw:
            ids = self._tokenizer.encode(text)
            return self._start(Ask(ids, sampling, mode, confirmed=confirmed, grammar=grammar))
        turn = self._talk.turn(text)
        ask = Ask(
            turn.prompt.ids,
            sampling,
            mode,
            turn,
            confirmed=confirmed,
            detokenizer=self._runtime._completions.text(),
            grammar=grammar,
        )
        return self._start(ask)

    def submit_ids(
        self,
        token_ids: Iterable[int],
        sampling: SamplingParams | None = None,
        *,
        prefill: PrefillMode | None = None,
        confirmed: bool = False,
        grammar: Grammar | None = None,
    ) -> ReplyStream:
        """Continue token ids as they are: no template, no history. For benchmarks and tests.

        Raises:
            ConfigError: One is no id of the model's; others as in `respond`.
        """
        self._check_open()
        sampling = _check_sampling(sampling)
        ids = self._runtime._checked_ids(token_ids)
        mode = self._prefill_mode(prefill)
        ask = Ask(ids, sampling, mode, confirmed=confirmed, grammar=grammar)
        return ReplyStream(self._start(ask), self)

    def _whole(self, reply: Reply[T] | None) -> Reply[T]:
        assert reply is not None
        if reply.finish_reason == "cancelled":  # by another thread: who waits did not
            raise closed_error(self.name)
        return reply

    def _start(self, ask: Ask, priority: Priority | None = None) -> RunningReply:
        self._running = running = self._talk.start(ask, priority or self.app.priority)
        if self._closed:  # meanwhile, by another thread, which may not have seen it
            running.finish()
        return running

    def _prefill_mode(self, asked: PrefillMode | None) -> PrefillMode:
        """What a request does: as it says, or its session, its app, the runtime."""
        usual = self._runtime.config.prediction.prefill
        choices = (asked, self.prefill, self.app.prefill, usual)
        mode = next(choice for choice in choices if choice is not None)
        check_choice("prefill", mode, PREFILL_MODES)
        if mode != "exact" and not self._runtime.predicts:
            raise ConfigError(
                f"prefill is {mode!r}, and this runtime has no KV predictor",
                hint="open it with RuntimeConfig(prediction=PredictionOptions(predictor=...))",
            )
        return mode


def check_system(system: object) -> None:
    """Make sure that a system prompt is Unicode text, or None.

    Raises:
        ConfigError: It is not, and every request would fail.
    """
    if system is None:
        return
    if not isinstance(system, str) or any("\ud800" <= char <= "\udfff" for char in system):
        raise ConfigError.of("system", system, "Unicode text or None")


def _check_sampling(sampling: SamplingParams | None) -> SamplingParams:
    if sampling is None:
        return AS_MEANT
    return check_kind("sampling", sampling, SamplingParams, allowed="SamplingParams or None")
