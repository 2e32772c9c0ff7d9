"""Answers to conversations that their callers have: a request in the session that knows most of it.

See `branches` for which that is, and `edgekv.chat.events` for what happens.
"""

import itertools
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import xxhash

from edgekv.chat.answer import AnswerParser
from edgekv.chat.channels import ChannelText
from edgekv.chat.events import Begun, EndReason, Event, Finished, TokenLogprob, Usage
from edgekv.chat.formats import AnswerFormat, answer_format
from edgekv.chat.render import effort_of
from edgekv.chat.values import ChatMessage, Completion
from edgekv.engine.outbox import Delta, TokenLogprobs
from edgekv.errors import GrammarError, PromptEmpty, PromptTooLong, SessionBusy
from edgekv.runtime.branches import Branches
from edgekv.runtime.conversation import Scribe
from edgekv.runtime.reply import AsyncReplyStream, Reply, ReplyStream, RunningReply, in_thread
from edgekv.runtime.talk import Ask, Turn
from edgekv.tokenizer import Tokenizer
from edgekv.tokenizer.answer_text import IncrementalDetokenizer
from edgekv.tokenizer.constraint import begin
from edgekv.tokenizer.grammar import Grammar

if TYPE_CHECKING:
    from edgekv.runtime.app import App
    from edgekv.runtime.session import Session

APPS_MAX = 64  # whose sessions stay open
_OPENED_CHARS = 64  # of a prompt's end, where an answer's form may have begun


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A completion that runs: its request, and how its text is read."""

    session: "Session"
    running: RunningReply
    parser: AnswerParser
    num_prompt: int
    tokenizer: Tokenizer

    def events_of(self, delta: Delta) -> list[Event]:
        """What a change of the text means."""
        logprobs = tuple(_token_logprob(self.tokenizer, row) for row in delta.logprobs)
        return self.parser.push(delta.text, logprobs)

    def end(self, reply: Reply) -> list[Event]:
        """The end of the answer."""
        events = self.parser.end()
        message, stats = self.parser.message, reply.stats
        reason: EndReason = reply.finish_reason
        if reason == "stop" and message.tool_calls and not self.parser.cut:
            reason = "tool_calls"
        usage = Usage(
            num_prompt=stats.num_prompt_tokens,
            num_cached=stats.num_cached_tokens,
            num_output=stats.num_output_tokens,
            num_reasoning=_part(stats.num_output_tokens, message.reasoning, reply.text),
        )
        logprobs = tuple(_token_logprob(self.tokenizer, row) for row in reply.logprobs)
        return [
            *events,
            Finished(
                reason=reason,
                message=message,
                usage=usage,
                stats=stats,
                stop=reply.stop,
                logprobs=logprobs,
            ),
        ]


class Begins(Protocol):
    """A completion that runs, here or in a daemon."""

    @property
    def session(self) -> object:
        """What is open as long as somebody reads."""

    @property
    def running(self) -> RunningReply:
        """Its request."""

    @property
    def num_prompt(self) -> int:
        """Tokens of its prompt."""

    def events_of(self, delta: Delta) -> list[Event]:
        """What a change of the text means."""

    def end(self, reply: Reply) -> list[Event]:
        """The end of the answer."""


class CompletionStream:
    """Events of one completion as they come; leaving the loop or closing it cancels the request.

    Raises what failed, as `ReplyStream` does: no event says so here.
    """

    def __init__(self, begun: Begins, timeout_s: float | None = None) -> None:
        self._begun = begun
        self._stream = ReplyStream(begun.running, begun.session, timeout_s=timeout_s)
        self._events: list[Event] = [Begun(num_prompt=begun.num_prompt)]
        self.finished: Finished | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not self._events:
            if self.finished is not None:
                raise StopIteration
            delta = self._stream.wait()
            if delta is not None:
                self._events += self._begun.events_of(delta)
            else:
                assert self._stream.reply is not None
                self._events += self._begun.end(self._stream.reply)
        event = self._events.pop(0)
        if isinstance(event, Finished):
            self.finished = event
        return event

    @property
    def reply(self) -> Reply | None:
        """The answer as it was generated, once it has ended without error."""
        return self._stream.reply

    def close(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncCompletionStream:
    """The asyncio twin of `CompletionStream`."""

    def __init__(self, begun: Begins) -> None:
        self._begun = begun
        self._stream = AsyncReplyStream(begun.running, begun.session)
        self._events: list[Event] = [Begun(num_prompt=begun.num_prompt)]
        self.finished: Finished | None = None

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Prompt tokens that have KV, and all prompt tokens."""
        return self._stream.prefill_progress

    @property
    def reply(self) -> Reply | None:
        """The answer as it was generated, once it has ended without error."""
        return self._stream.reply

    def cancel(self) -> None:
        """Take the request back, and wait for nothing: whoever reads on reads its end."""
        self._stream.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self.finished is not None:
                raise StopAsyncIteration
            try:
                self._events += self._begun.events_of(await anext(self._stream))
            except StopAsyncIteration:
                assert self._stream.reply is not None
                self._events += self._begun.end(self._stream.reply)
        event = self._events.pop(0)
        if isinstance(event, Finished):
            self.finished = event
        return event

    async def aclose(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it."""
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


class Completions:
    """Which session answers a completion. Owned by the runtime; any thread may ask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        hidden = tokenizer.vocabulary.hidden_tokens
        added = [tokenizer.vocabulary.tokens[i] for i in tokenizer.vocabulary.literal_ids]
        self.format: AnswerFormat = answer_format(
            template.source if template else "", hidden, [token for token in added if token]
        )
        self._spelled = frozenset(i for text, i in hidden.items() if text in self.format.spelled)
        tokens_of_text = (token for token in tokenizer.vocabulary.tokens if token)
        self._token_chars_max = max(map(len, tokens_of_text), default=1)
        self._lock = threading.Lock()  # guards what follows
        self._branches: OrderedDict[str, Branches] = OrderedDict()  # by app, used last last

    def text(self) -> IncrementalDetokenizer:
        """Makes text of an answer for those who read no events."""
        vocabulary = self._tokenizer.vocabulary
        return (ChannelText if self.format.channels else IncrementalDetokenizer)(vocabulary)

    def read_text(self, text: str) -> ChatMessage:
        """An answer from this text: all of it is what was said, but for what `text` has marked."""
        if not self.format.channels:
            return ChatMessage(role="assistant", content=text)
        return read_whole(AnswerFormat(name="text").parser(tools=()), text)

    def begin(self, app: "App", asked: Completion, *, aside: bool = False) -> _Begun:
        """Ask it; `aside` in a session of its own, which is not kept.

        Raises:
            RequestError, ConfigError: It cannot be answered as asked.
            TooManySessions, QueueFull, RuntimeClosed, EngineFailed: See `Session.respond`.
        """
        if asked.prompt is None and not asked.messages:
            raise PromptEmpty("there are no messages", hint="say something")
        if aside:
            return self._start(app.session(), asked)
        with self._of(app).session(app, asked) as session:
            return self._start(session, asked)

    def _of(self, app: "App") -> Branches:
        """The app's sessions; those of the app that asked least lately leave memory for it."""
        with self._lock:
            branches = self._branches.setdefault(app.name, Branches())
            self._branches.move_to_end(app.name)
            num_left = max(0, len(self._branches) - APPS_MAX)
            left = [self._branches.popitem(last=False)[1] for _ in range(num_left)]
        for idle in left:
            idle.close_idle()
        return branches

    def go_on(self, session: "Session", asked: Completion) -> _Begun:
        """Ask it in a session: what was said there, and more.

        Raises:
            SessionBusy: Something else was said there meanwhile; others as `Session.respond`.
        """
        return self._start(session, asked, goes_on=True)

    def scribe(self, asked: Completion) -> Scribe:
        """How a completion's conversation is written."""
        return Scribe(
            tokenizer=self._tokenizer,
            tools=asked.tools,
            thinking=asked.thinking,
            effort=effort_of(self._tokenizer, asked.effort),
            tools_prompt=self.format.tools_prompt(asked.tools) if asked.tools else "",
        )

    def count(self, asked: Completion) -> int:
        """Tokens of its prompt, as if nothing of it was said before."""
        if asked.prompt is not None:
            return len(self._tokenizer.encode(asked.prompt))
        chat = self.scribe(asked).write(asked.messages, add_generation_prompt=True)
        return len(self._tokenizer.encode_chat(chat))

    def _start(self, session: "Session", asked: Completion, *, goes_on: bool = False) -> _Begun:
        session._check_open()
        talk = session._talk
        talk.settle()
        mode = session._prefill_mode(asked.prefill)
        self._check_length(asked, session._runtime.context_max)
        if asked.prompt is not None:
            parser = AnswerFormat(name="text", thoughts=()).parser(tools=())
            ids = self._tokenizer.encode(asked.prompt)
            ask = Ask(ids, asked.sampling, mode, grammar=asked.grammar)
        else:
            before = talk.conversation
            if goes_on and asked.messages[: len(before.messages)] != before.messages:
                raise SessionBusy(
                    f"session {session.name!r} was given another turn meanwhile",
                    hint="ask again: this was to follow an older history",
                )
            scribe = self.scribe(asked)
            prompt = before.prompt_of(scribe, asked.messages)
            seed = secrets.token_bytes(16)
            parser = self._parser(asked, prompt.text, seed)

            def read(text: str) -> ChatMessage:  # with the same ids of calls
                return read_whole(self._parser(asked, prompt.text, seed), text)

            turn = Turn(asked.messages, before, prompt, read, asked.tools, scribe.effort)
            grammar = self._grammar(asked, prompt.text)
            detokenizer = self._tokenizer.detokenizer(self._spelled)
            ask = Ask(
                prompt.ids, asked.sampling, mode, turn, detokenizer=detokenizer, grammar=grammar
            )
        try:
            running = session._start(ask, asked.priority)
        except GrammarError as error:
            raise self._blamed(asked, error) from error
        return _Begun(
            session=session,
            running=running,
            parser=parser,
            num_prompt=len(ask.ids),
            tokenizer=self._tokenizer,
        )

    def _grammar(self, asked: Completion, prompt: str) -> Grammar | None:
        """What the answer must match: calls that are wanted, or what was asked for.

        An answer in JSON may be calls before it is that.
        """
        grammar, choice, calls = asked.grammar, asked.tool_choice, False
        is_json = grammar is not None and grammar.kind in ("json_schema", "json_object")
        if choice == "required" or (choice == "auto" and asked.tools and is_json):
            calls = True
            grammar = self.format.call_grammar(
                asked.tools,
                name=asked.tool_name,
                parallel=asked.parallel_tool_calls,
                answer=grammar if choice == "auto" else None,
            )
        if grammar is None:
            return None
        return self.format.constrained(grammar, prompt[-_OPENED_CHARS:], calls=calls)

    def _parser(self, asked: Completion, prompt: str, seed: bytes) -> AnswerParser:
        tools = () if asked.tool_choice == "none" else asked.tools
        numbers = itertools.count()

        def call_id() -> str:
            return f"call_{xxhash.xxh3_128_hexdigest(seed + bytes([next(numbers) % 256]))[:24]}"

        return self.format.parser(tools=tools, opened=prompt[-_OPENED_CHARS:], call_id=call_id)

    def _check_length(self, asked: Completion, tokens_max: int) -> None:
        """Refuse what cannot fit however it is cut into tokens, before minutes of cutting.

        Raises:
            PromptTooLong: With the least number of tokens that it could have.
        """
        num_chars = len(asked.prompt or "") + sum(len(m.content) for m in asked.messages)
        if num_chars <= tokens_max:
            return
        num_tokens = num_chars // self._token_chars_max
        if num_tokens > tokens_max:
            raise PromptTooLong(
                f"the prompt has at least {num_tokens} tokens; a session holds {tokens_max}",
                hint="shorten it",
                num_tokens=num_tokens,
                tokens_max=tokens_max,
            )

    def _blamed(self, asked: Completion, error: GrammarError) -> GrammarError:
        """An error of a grammar that was made of tools' schemas, by the tool whose fault it is."""
        if asked.tool_choice != "required":
            return error
        for index, tool in enumerate(asked.tools):
            try:
                begin(Grammar(kind="json_schema", text=tool.parameters), self._tokenizer)
            except GrammarError as own:
                return GrammarError(f"tools[{index}] ({tool.name}), its parameters: {own}")
        return error


def read_whole(parser: AnswerParser, text: str) -> ChatMessage:
    """A whole answer as a message."""
    parser.push(text)
    parser.end()
    return parser.message


def _part(num_tokens: int, part: str, whole: str) -> int:
    """So many tokens a part of a text has, if all are as long."""
    return round(num_tokens * min(1.0, len(part) / len(whole))) if part and whole else 0


def _token_logprob(tokenizer: Tokenizer, row: TokenLogprobs) -> TokenLogprob:
    def spelled(token_id: int, logprob: float) -> TokenLogprob:
        token = tokenizer.vocabulary.spelled_bytes(token_id)
        text = token.decode("utf-8", "replace")
        return TokenLogprob(token=text, token_bytes=token, logprob=logprob)

    chosen = spelled(row.token_id, row.logprob)
    top = tuple(spelled(token_id, logprob) for token_id, logprob in row.top)
    return TokenLogprob(
        token=chosen.token, token_bytes=chosen.token_bytes, logprob=row.logprob, top=top
    )


async def abegin(begin: Callable[[], Begins]) -> Begins:
    """Begin without blocking the loop: encoding a long prompt takes a while."""
    begun: list[Begins] = []
    try:
        await in_thread(lambda: begun.append(begin()))
    except BaseException:
        for one in begun:
            await one.running.afinish()
        raise
    return begun[0]
