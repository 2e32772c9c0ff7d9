"""Who owns sessions, and what it may have: terms that can be changed, and end with the app."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, overload

from edgekv.chat.events import Finished
from edgekv.chat.said import Said, completion_of
from edgekv.chat.values import Completion
from edgekv.config import (
    PREFILL_MODES,
    PRIORITIES,
    PrefillMode,
    Priority,
    SamplingParams,
    check_choice,
    check_float,
    check_int,
    check_kind,
)
from edgekv.errors import ConfigError, RuntimeClosed
from edgekv.runtime.answers import (
    TOOL_ROUNDS_MAX,
    AnswerStream,
    AsyncAnswerStream,
    Rounds,
    Schema,
    Toolbox,
)
from edgekv.runtime.completions import AsyncCompletionStream, Begins, CompletionStream, abegin
from edgekv.runtime.keeper import SessionInfo
from edgekv.runtime.reply import Reply, check_timeout, in_time
from edgekv.runtime.session import AS_MEANT, Session
from edgekv.tokenizer.grammar import Grammar

if TYPE_CHECKING:  # MLX, which an app of a daemon does without
    from edgekv.engine.inbox import AppTerms
    from edgekv.runtime.runtime import Runtime

T = TypeVar("T")
NAME_LENGTH_MAX = 256


class Terms(TypedDict, total=False):
    """What an app may have. What is not given, or None, stays as it is.

    Attributes:
        weight: Its share of the service, relative to the other apps of its class, 0.001 to 1000;
            at first 1.
        priority: Its class; at first "interactive", which goes before "background".
        pinned_bytes: KV memory that no other app can take from its sessions; at first none.
        num_waiting_max: Requests of it, submitted and not finished, 1 to 2^20; at first, and with 0
            again, it may have another while it has no more than are left of the limit for all apps.
        num_sessions_max: Open sessions of it; the same.
        prefill: Whether its prompts' KV is predicted; see `App.prefill`.
    """

    weight: float | None
    priority: Priority | None
    pinned_bytes: int | None
    num_waiting_max: int | None
    num_sessions_max: int | None
    prefill: PrefillMode | None


class CompleteOptions(Toolbox, total=False):
    """How a conversation of the caller's is answered.

    Attributes:
        sampling: How tokens are chosen, where not as the model's makers say.
        grammar: What the answer's text must match.
        session: Names the conversation; "" finds it by what was said.
    """

    sampling: SamplingParams | None
    grammar: Grammar | None
    session: str


class App:
    """Who owns sessions: its weight and priority decide its share of compute.

    Cached KV is visible only to the app that made it. `Runtime.app` finds or opens one,
    `Runtime.apps` has those that are open. One that nobody refers to, with the terms that a new one
    has and without open sessions, is as if it had been closed.
    """

    def __init__(self, runtime: "Runtime", terms: "AppTerms") -> None:
        self._runtime = runtime
        self._terms = terms  # as the engine has them; changed inside the runtime's lock
        self._closed = False  # as well
        self._prefill: PrefillMode | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self._terms.name

    @property
    def weight(self) -> float:
        """Its share relative to apps of the same class."""
        return self._terms.weight

    @property
    def priority(self) -> Priority:
        """Its class; "interactive" goes before "background"."""
        return self._terms.priority

    @property
    def pinned_bytes(self) -> int:
        """KV memory that no other app can take from its sessions."""
        return self._terms.pinned_bytes

    @property
    def prefill(self) -> PrefillMode | None:
        """Whether its prompts' KV is predicted, where neither request nor session says.

        None leaves it to the runtime. Setting it raises as `update` does.
        """
        return self._prefill

    @prefill.setter
    def prefill(self, mode: PrefillMode | None) -> None:
        given = checked({"prefill": mode})
        with self._runtime._lock:
            self._check_open()
            self._take({"prefill": None} | given)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def update(self, **terms: Unpack[Terms]) -> None:
        """Change what it may have, from now on; see `Terms`.

        Raises:
            ConfigError: A value is not allowed; nothing was changed.
            RuntimeClosed: The app or the runtime was closed.
        """
        given = checked(terms)
        with self._runtime._lock:
            self._check_open()
            self._take(given)

    def _take(self, given: dict[str, Any]) -> None:
        """Take over terms that were checked; inside the runtime's lock."""
        self._prefill = given.pop("prefill", self._prefill)
        terms = replace(self._terms, **given)
        if terms != self._terms:
            self._terms = terms
            self._runtime._engine.inbox.post(terms)
        self._runtime._hold(self, terms.usual and self._prefill is None)

    def _check_open(self) -> None:
        self._runtime._check_open()
        if self._closed:
            raise RuntimeClosed(f"app {self.name!r} was closed", hint="open it again: runtime.app")

    def session(self, name: str | None = None, *, system: str | None = None) -> Session:
        """Open a session; several of one name share what is said, see `Session`.

        Args:
            name: Its name within the app; None makes a new one.
            system: System prompt of a new session, or of one in which nothing was said yet.

        Raises:
            TooManySessions: The app has, or all apps have, as many open as they may.
            ConfigError: The name is empty, too long or no Unicode text, or the session of this
                name has another system prompt.
            StoreError: The store cannot be read.
            RuntimeClosed: The app or the runtime was closed.
        """
        return self._runtime._open_session(self, name, system)

    @overload
    def complete(self, asked: Completion, *, timeout_s: float | None = None) -> Finished: ...
    @overload
    def complete(
        self,
        asked: Said,
        *,
        schema: type[T],
        timeout_s: float | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Reply[T]: ...
    @overload
    def complete(
        self,
        asked: Said,
        *,
        schema: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Reply[Any]: ...
    def complete(
        self,
        asked: Completion | Said,
        *,
        schema: Schema[Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Finished | Reply[Any]:
        """Answer a conversation that the caller has, and wait for the whole answer.

            reply = app.complete([{"role": "user", "content": "Hello"}])
            print(reply.text)

        Args:
            asked: All of it: messages, as dicts or `ChatMessage` values, or one text of the user;
                or a `Completion`, which says the rest, too: calls in its answer are the caller's.
            schema: What the answer must be, see `Session.respond`.
            timeout_s: See `Session.respond`.
            options: See `CompleteOptions`.

        Raises as `Session.respond` does.
        """
        if isinstance(asked, Completion):
            _check_alone(schema, options)
            with self.stream(asked, timeout_s=timeout_s) as completion:
                for _ in completion:
                    pass
            assert completion.finished is not None
            return completion.finished
        check_timeout(timeout_s)
        with AnswerStream(_rounds(asked, schema, **options), self._begin, timeout_s) as stream:
            for _ in stream:
                pass
        return self._whole(stream.reply)

    @overload
    async def acomplete(self, asked: Completion, *, timeout_s: float | None = None) -> Finished: ...
    @overload
    async def acomplete(
        self,
        asked: Said,
        *,
        schema: type[T],
        timeout_s: float | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Reply[T]: ...
    @overload
    async def acomplete(
        self,
        asked: Said,
        *,
        schema: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Reply[Any]: ...
    async def acomplete(
        self,
        asked: Completion | Said,
        *,
        schema: Schema[Any] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Finished | Reply[Any]:
        """`complete` for asyncio; cancelling the task cancels the request."""
        check_timeout(timeout_s)
        async with in_time(timeout_s):
            if isinstance(asked, Completion):
                _check_alone(schema, options)
                async with await self.astream(asked) as completion:
                    async for _ in completion:
                        pass
                assert completion.finished is not None
                return completion.finished
            rounds = _rounds(asked, schema, **options)
            async with await AsyncAnswerStream.open(rounds, self._begin) as stream:
                async for _ in stream:
                    pass
        return self._whole(stream.reply)

    def stream(
        self, asked: Completion | Said, *, timeout_s: float | None = None
    ) -> CompletionStream:
        """A completion event by event; what was said before of it is not computed anew.

        See `edgekv.chat.events` for what happens. Leaving the loop cancels the request.
        """
        check_timeout(timeout_s)
        return CompletionStream(self._begin(completion_of(asked)), timeout_s)

    async def astream(
        self, asked: Completion | Said, *, aside: bool = False
    ) -> AsyncCompletionStream:
        """`stream` for asyncio; `aside` in a session of its own, which is gone with its answer."""
        completion = completion_of(asked)
        return AsyncCompletionStream(await abegin(lambda: self._begin(completion, aside=aside)))

    def _begin(self, asked: Completion, *, aside: bool = False) -> Begins:
        return self._runtime._completions.begin(self, asked, aside=aside)

    def _whole(self, reply: Reply[T] | None) -> Reply[T]:
        assert reply is not None
        if reply.finish_reason == "cancelled":  # by another thread: who waits did not
            raise RuntimeClosed(f"app {self.name!r} was closed", hint="open it again: runtime.app")
        return reply

    def knows(self, name: str) -> bool:
        """Whether a session of this name is open or stored."""
        self._check_open()
        return self._runtime._knows_session(self, name)

    def sessions(self) -> list[SessionInfo]:
        """Its named sessions that are stored, open or not, the one used last first.

        Raises:
            StoreError: The store cannot be read.
            RuntimeClosed: The app or the runtime was closed.
        """
        self._check_open()
        keeper = self._runtime._keeper
        return [] if keeper is None else keeper.sessions(self.name)

    def remove(self, name: str) -> bool:
        """Close the sessions of this name, and forget what was said in them and its KV.

        Returns:
            Whether there was one.

        Raises:
            ConfigError: This cannot be a session's name.
            StoreError: The store cannot be written.
            RuntimeClosed: The app or the runtime was closed.
        """
        check_name("session name", name)
        return self._runtime._remove_session(self, name)

    def close(self) -> None:
        """Close its sessions, and forget its terms: what they said stays stored.

        `Runtime.app` opens another app of this name, with terms of its own. Closing twice is
        nothing.

        Raises:
            ForkedProcess: The app is a parent process's.
        """
        self._runtime._close_app(self)

    def forget(self) -> None:
        """`close`, and remove all that is stored of its sessions: what was said, and KV.

        Raises:
            StoreError: The store cannot be read or written.
            RuntimeClosed: The app or the runtime was closed.
        """
        self._check_open()
        self.close()
        self._runtime._remove_stored(self.name)


def _check_alone(schema: object, options: object) -> None:
    """Raises ConfigError where something is said beside a `Completion`, which says all."""
    if schema is not None or options:
        raise ConfigError(
            "a Completion is given, and schema or options beside it",
            hint="say it in the Completion, or give messages",
        )


def _rounds(
    asked: Said, schema: Schema[Any] | None, **options: Unpack[CompleteOptions]
) -> Rounds[Any]:
    """What `App.complete` is asked. Raises ConfigError where an option is not what it should be."""
    sampling, grammar = options.get("sampling"), options.get("grammar")
    if sampling is not None:
        check_kind("sampling", sampling, SamplingParams, allowed="SamplingParams or None")
    if grammar is not None:
        check_kind("grammar", grammar, Grammar, allowed="a Grammar or None")
    completion = replace(
        completion_of(asked),
        sampling=sampling or AS_MEANT,
        grammar=grammar,
        session_key=check_kind("session", options.get("session", ""), str, allowed="a string"),
    )
    return Rounds(
        completion,
        schema=schema,
        tools=options.get("tools"),
        tool_rounds_max=options.get("tool_rounds_max", TOOL_ROUNDS_MAX),
    )


def checked(terms: Terms) -> dict[str, Any]:
    """The terms that are given. Raises ConfigError where a value is not allowed."""
    given = {field: value for field, value in terms.items() if value is not None}
    for field, value in given.items():
        match field:
            case "weight":
                check_float(field, value, 0.001, 1000.0)
            case "priority":
                check_choice(field, value, PRIORITIES)
            case "pinned_bytes":
                check_int(field, value, 0, 1 << 50)
            case "num_waiting_max" | "num_sessions_max":
                given[field] = check_int(field, value, 0, 1 << 20) or None
            case "prefill":
                check_choice(field, value, PREFILL_MODES)
            case _:
                raise TypeError(
                    f"{field!r} is none of an app's terms: {', '.join(Terms.__annotations__)}"
                )
    return given


def check_name(field: str, name: object) -> None:
    """Accept what can be the name of an app or a session. Raises ConfigError."""
    if not isinstance(name, str) or not 1 <= len(name) <= NAME_LENGTH_MAX:
        raise ConfigError.of(field, name, f"a string of 1 to {NAME_LENGTH_MAX} characters")
    # No file can hold lone surrogates, and NUL begins the names that unnamed sessions have there.
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in name):
        raise ConfigError.of(field, name, "Unicode text, without NUL and lone surrogates")
