"""Answers with tools or of a type: rounds of a model that calls and functions that are called.

    asked ─▶ completion ─▶ calls ─▶ functions ─▶ results ─┐
               ▲   └─▶ text ─▶ Reply                      │
               └──────────────────────────────────────────┘

Each round is a completion of its own, and says all that was said before it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Self, TypedDict

from edgekv.chat.events import Event, Finished
from edgekv.chat.functions import Tools, read_tools
from edgekv.chat.typed import AnswerType
from edgekv.chat.values import ChatMessage, Completion, ToolCall
from edgekv.config import check_int
from edgekv.errors import ConfigError
from edgekv.runtime.completions import AsyncCompletionStream, Begins, CompletionStream, abegin
from edgekv.runtime.reply import Reply, V

TOOL_ROUNDS_MAX = 8
Schema = type[V] | Mapping[str, Any]


class Toolbox(TypedDict, total=False):
    """What the model may call.

    Attributes:
        tools: Functions, whose calls are run until the model has an answer: what they return, or
            raise, is said to it. Or `Tool` values: the reply has the calls.
        tool_rounds_max: So often in a row functions are called, 0 to 1000; where it wants more, the
            reply has those calls.
    """

    tools: Tools | None
    tool_rounds_max: int


class Rounds(Generic[V]):
    """What is asked next until the answer is there. Owned by the stream that asks.

    Attributes:
        asked: The next completion, or the last.
    """

    def __init__(
        self,
        asked: Completion,
        *,
        schema: Schema[V] | None = None,
        tools: Tools | None = None,
        tool_rounds_max: int = TOOL_ROUNDS_MAX,
    ) -> None:
        """Of a completion that has neither tools nor, with a schema, a grammar yet.

        Raises:
            ConfigError: Tools, their rounds or the schema are not what they should be.
        """
        check_int("tool_rounds_max", tool_rounds_max, 0, 1000)
        self._left = tool_rounds_max
        self._functions = None
        if tools is not None:
            described, self._functions = read_tools(tools)
            asked = replace(asked, tools=described)
        self._type: AnswerType[V] | None = None
        if schema is not None:
            if asked.grammar is not None:
                raise ConfigError("grammar and schema are given", hint="give one of them")
            self._type = AnswerType(schema)
            asked = replace(asked, grammar=self._type.grammar)
        self.asked = asked

    def check_sync(self) -> None:
        """Make sure that no function must be awaited. Raises ConfigError."""
        if self._functions is not None and self._functions.async_names:
            names = ", ".join(sorted(self._functions.async_names))
            raise ConfigError(
                f"tools must be awaited: {names}", hint="arespond, astream and acomplete do that"
            )

    def calls(self, end: Finished) -> tuple[ToolCall, ...]:
        """What is to be run before the model goes on."""
        if self._functions is None or end.reason != "tool_calls" or not self._left:
            return ()
        return end.message.tool_calls

    def run(self, end: Finished) -> None:
        """Run what it calls."""
        assert self._functions is not None
        self._go_on(end, [self._functions.call(call) for call in self.calls(end)])

    async def arun(self, end: Finished) -> None:
        """`run` for asyncio; one call after the other."""
        assert self._functions is not None
        self._go_on(end, [await self._functions.acall(call) for call in self.calls(end)])

    def _go_on(self, end: Finished, results: Sequence[ChatMessage]) -> None:
        self._left -= 1
        self.asked = replace(self.asked, messages=(*self.asked.messages, end.message, *results))

    def reply(self, end: Finished, generated: Reply) -> Reply[V]:
        """The answer. Raises AnswerInvalid."""
        value: Any = None
        if self._type is not None and end.reason in ("stop", "length"):
            value = self._type.read(end.message.content, cut=end.reason == "length")
        made: Any = replace(
            generated,
            text=end.message.content,
            reasoning=end.message.reasoning,
            tool_calls=end.message.tool_calls,
            value=value,
        )
        reply: Reply[V] = made
        return reply


class AnswerStream(Generic[V]):
    """Events of an answer as they come, and of the calls on the way to it.

    Every round is a `Begun` to its `Finished`; between two of them the functions run, on the thread
    that reads. Leaving the loop or closing it cancels the request.

    Attributes:
        reply: The answer, once the loop has ended.
    """

    def __init__(
        self,
        rounds: Rounds[V],
        begin: Callable[[Completion], Begins],
        timeout_s: float | None = None,
    ) -> None:
        rounds.check_sync()
        self._rounds, self._begin = rounds, begin
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.reply: Reply[V] | None = None
        self._stream: CompletionStream | None = self._next()

    def _next(self) -> CompletionStream:
        begun = self._begin(self._rounds.asked)
        end = self._deadline
        return CompletionStream(begun, None if end is None else max(0.0, end - time.monotonic()))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while (stream := self._stream) is not None:
            for event in stream:
                return event
            self._stream = None  # whatever fails from here on, there is nothing more
            assert stream.finished is not None
            if self._rounds.calls(stream.finished):
                self._rounds.run(stream.finished)
                self._stream = self._next()
            else:
                assert stream.reply is not None
                self.reply = self._rounds.reply(stream.finished, stream.reply)
        raise StopIteration

    def close(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it."""
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncAnswerStream(Generic[V]):
    """The asyncio twin of `AnswerStream`: functions that are not async run on a thread."""

    def __init__(
        self,
        rounds: Rounds[V],
        begin: Callable[[Completion], Begins],
        stream: AsyncCompletionStream,
    ) -> None:
        self._rounds, self._begin = rounds, begin
        self.reply: Reply[V] | None = None
        self._stream: AsyncCompletionStream | None = stream

    @classmethod
    async def open(
        cls, rounds: Rounds[V], begin: Callable[[Completion], Begins]
    ) -> "AsyncAnswerStream[V]":
        """Ask the first round."""
        begun = await abegin(lambda: begin(rounds.asked))
        return cls(rounds, begin, AsyncCompletionStream(begun))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while (stream := self._stream) is not None:
            async for event in stream:
                return event
            self._stream = None
            assert stream.finished is not None
            if self._rounds.calls(stream.finished):
                await self._rounds.arun(stream.finished)
                begun = await abegin(lambda: self._begin(self._rounds.asked))
                self._stream = AsyncCompletionStream(begun)
            else:
                assert stream.reply is not None
                self.reply = self._rounds.reply(stream.finished, stream.reply)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it."""
        if self._stream is not None:
            await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()
