"""An open conversation, what it is made of, and the request that it answers; which ones there are.

Several sessions may have one open, those that were opened under its name: it ends with the last.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakSet

from edgekv.chat.values import ChatMessage, Tool
from edgekv.config import PrefillMode, Priority, SamplingParams
from edgekv.engine.outbox import Outbox
from edgekv.engine.shares import Shares
from edgekv.errors import (
    FETCH_AGAIN,
    ConfigError,
    PromptEmpty,
    PromptTooLong,
    RequestError,
    RuntimeClosed,
    SessionBusy,
    TooManySessions,
)
from edgekv.runtime.conversation import Conversation, Prompt, opening
from edgekv.runtime.keeper import KeptSession
from edgekv.runtime.reply import Reply, RunningReply
from edgekv.tokenizer import StopMatcher
from edgekv.tokenizer.answer_text import IncrementalDetokenizer
from edgekv.tokenizer.constraint import begin
from edgekv.tokenizer.grammar import Grammar

if TYPE_CHECKING:
    from edgekv.engine.request import Request
    from edgekv.runtime.app import App
    from edgekv.runtime.session import Session


def closed_error(name: str) -> RuntimeClosed:
    """What a session that was closed says."""
    return RuntimeClosed(f"session {name!r} was closed", hint="open another one")


class Turn(NamedTuple):
    """What is said, and the history that its prompt was made from.

    Attributes:
        messages: All that is answered.
        before: What was said before, perhaps in other messages.
        prompt: Made of both.
        read: The answer's text as a message.
        tools: What can be called.
        effort: How much is to be thought.
    """

    messages: tuple[ChatMessage, ...]
    before: Conversation
    prompt: Prompt
    read: Callable[[str], ChatMessage]
    tools: tuple[Tool, ...] = ()
    effort: str = ""


class Ask(NamedTuple):
    """A request as its session asks it.

    Attributes:
        turn: What of the conversation it is; None leaves that as it is.
        prefill_only: Only the prompt's KV is wanted, and no answer.
        confirmed: Whoever reads is told nothing that could be taken back.
        detokenizer: Makes text of the answer; None has one that shows no control tokens.
        grammar: What the answer must match.
    """

    ids: Sequence[int]
    sampling: SamplingParams
    prefill: PrefillMode
    turn: Turn | None = None
    prefill_only: bool = False
    confirmed: bool = True
    detokenizer: IncrementalDetokenizer | None = None
    grammar: Grammar | None = None


class Talk:
    """A conversation while it is open. Any thread may call it; it answers one request at a time.

    Attributes:
        app: Who opened it last, and so is an app though nobody else refers to it; guarded by the
            runtime's lock, as the next.
        sessions: Who has it open, and is still referred to.
        place: By which its app's sessions are told apart: its name, if somebody gave it one.
    """

    def __init__(
        self,
        app: "App",
        name: str,
        conversation: Conversation,
        kept: KeptSession | None,
        *,
        place: str,
    ) -> None:
        from edgekv.engine.request import EngineSession  # MLX: sessions of a daemon do without

        runtime = app._runtime
        self.app, self.app_name = app, app.name
        self.name, self.place = name, place
        self.kept = kept
        self.sessions: WeakSet[Session] = WeakSet()
        self._runtime = runtime
        self._tokenizer = runtime.tokenizer
        self._engine = runtime._engine
        self._lock = threading.Lock()  # guards what follows
        self.conversation = conversation
        self.last_reply: Reply | None = None
        self.running: RunningReply | None = None  # the last request
        self.ended = False
        if kept is None:
            self.kv = EngineSession(app=app.name)
        else:
            self.kv = self._engine.kept_session(
                app.name, name, kept.key, kept.token_ids, kept.state_ends
            )

    def settle(self) -> None:
        """Take in the end of a request that was taken back: what there was is a turn, too."""
        running = self.running
        if running is not None and running.taken_back:
            running.finish()

    def take_system(self, system: str | None) -> None:
        """Have this system prompt, if there is to be one; inside the runtime's lock.

        Raises:
            ConfigError: It has another one, and something was said or somebody has it open.
        """
        with self._lock:
            if system is None or system == self.conversation.system:
                return
            if self.sessions or (self.running is not None and not self.running.done):
                raise ConfigError(
                    f"session {self.name!r} is open with another system prompt",
                    hint="close it first, or use another name",
                )
            self.conversation = opening(self.name, system, self.conversation)

    def turn(self, text: str) -> Turn:
        """The next turn: its prompt, made of what was said so far."""
        conversation = self.conversation
        prompt = self.prompt(text, conversation)
        read = self._runtime._completions.read_text
        return Turn(conversation.with_user(text), conversation, prompt, read)

    def prompt(self, text: str | None, conversation: Conversation | None = None) -> Prompt:
        """The prompt of a next turn, or of its beginning."""
        prompt = (conversation or self.conversation).prompt(self._tokenizer, text)
        self._runtime._warn_of_plain_form()
        return prompt

    def start(self, ask: Ask, priority: Priority) -> RunningReply:
        """Submit a request.

        Raises:
            SessionBusy: Another is not over yet, or was over only after the prompt was made.
            PromptEmpty, PromptTooLong, RequestError: Of such a prompt.
            GrammarError: Of such a grammar.
            QueueFull, RuntimeClosed, EngineFailed: See `Inbox.submit`.
        """
        self._check_prompt(ask.ids)
        request = self._request(ask, priority)
        running = RunningReply(
            request.outbox,
            lambda: self._engine.cancel(request.request_id),
            lambda reply: None if ask.prefill_only else self._take_in(reply, ask.turn),
            self._save,
            self._runtime._home,
        )
        self.settle()
        with self._lock:
            self._check_free()
            if ask.turn is not None and ask.turn.before is not self.conversation:
                raise SessionBusy(
                    f"session {self.name!r} was given another turn meanwhile",
                    hint="ask again: the prompt was made for an older history",
                )
            self._engine.submit(request)
            self.running = running
            if self.kept is not None:
                self.kept.touch()
        return running

    def suspend(self) -> int:
        """See `Session.suspend`."""
        self.settle()
        with self._lock:
            self._check_free()
        return self._engine.suspend(self.kv)

    def clear(self, system: str | None) -> None:
        """See `Session.clear`."""
        self.settle()
        with self._lock:
            self._check_free()
            begun = self.conversation.system if system is None else system
            self._become(Conversation.begin(begun))
            self.last_reply = None
        self._save()

    def finish(self) -> None:
        """Take back the request that runs, and wait for its end."""
        if self.running is not None:
            self.running.finish()

    def end(self) -> None:
        """Nobody has it open any more; a request that runs is cancelled.

        Inside the runtime's lock: who opens another one of its name, whose KV may be the same,
        cannot ask that one before the engine hears of this end.
        """
        with self._lock:
            if not self.ended:
                self.ended = True
                self._engine.close_session(self.kv)

    def _check_free(self) -> None:
        self._runtime._check_open()
        if self.ended:
            raise closed_error(self.name)
        if self.running is not None and not self.running.done:
            raise SessionBusy(
                f"session {self.name!r} is answering another request",
                hint="wait for it, cancel it, or use another session",
            )

    def _become(self, conversation: Conversation) -> None:
        """Take the next conversation; inside the lock, so that they are noted in this order.

        Once the talk has ended its name may be another's, who saves for it.
        """
        before, self.conversation = self.conversation, conversation
        if self.kept is not None and not self.ended:
            self.kept.note(conversation, before)

    def _save(self) -> None:
        """Have on disk what was noted; outside the lock, for it waits for the disk."""
        if self.kept is not None:
            self.kept.save()

    def _take_in(self, reply: Reply, turn: Turn | None) -> None:
        with self._lock:
            self.last_reply = reply
            # A turn taken back before its first token is a turn that was not made: asked
            # again, the question must not stand there twice.
            unmade = reply.finish_reason == "cancelled" and not reply.token_ids
            if turn is not None and not unmade:
                ids, said = reply.token_ids, None
                if reply.stop is None:  # else the tokens say more than the text
                    said = Prompt(text=self._tokenizer.spell(ids), ids=tuple(ids))
                answer = turn.read(reply.text)
                before, prompt = turn.before, turn.prompt
                self._become(
                    before.after(turn.messages, prompt, answer, said, turn.tools, turn.effort)
                )

    def _request(self, ask: Ask, priority: Priority) -> "Request":
        from edgekv.engine.request import Request

        outbox = Outbox()
        outbox.prefill_progress = (0, len(ask.ids))
        return Request(
            session=self.kv,
            priority=priority,
            prompt_ids=list(ask.ids),
            sampling=ask.sampling.over(self._tokenizer.sampling),
            eos_ids=self._tokenizer.eos_ids,
            detokenizer=ask.detokenizer or self._tokenizer.detokenizer(),
            stop_matcher=StopMatcher(ask.sampling.stop),
            outbox=outbox,
            prefill_only=ask.prefill_only,
            num_asked=0 if ask.turn is None else ask.turn.prompt.num_asked,
            submitted_ms=self._runtime._clock.now_ms(),
            prefill="exact" if ask.grammar is not None else ask.prefill,
            constraint=None if ask.grammar is None else begin(ask.grammar, self._tokenizer),
            confirms=self._runtime.config.prediction.confirm,
            shows_ahead=not ask.confirmed,
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
                num_tokens=len(ids),
                tokens_max=tokens_max,
            )
        if max(ids) >= self._runtime._vocab_size:
            raise RequestError(
                f"the prompt has token {max(ids)}; the model knows {self._runtime._vocab_size}",
                hint=f"the tokenizer is another model's: {FETCH_AGAIN}",
            )


class OpenTalks:
    """Conversations that are open, by app and place. Guarded by the runtime's lock."""

    def __init__(self, num_max: int) -> None:
        self._open: dict[tuple[str, str], Talk] = {}
        self._shares = Shares(
            num_max,
            error=TooManySessions,
            what="sessions are open",
            limit="num_sessions_max",
            remedy="close some",
        )
        self._names = itertools.count(1)

    def __iter__(self) -> Iterator[Talk]:
        return iter(self._open.values())

    def get(self, app_and_place: tuple[str, str]) -> Talk | None:
        """The one that is open there."""
        return self._open.get(app_and_place)

    def begin(self, app: "App", name: str | None, system: str | None) -> Talk:
        """Open one of which there is none: what is stored under its name, or a new one.

        Raises:
            TooManySessions, ConfigError, StoreError: See `App.session`.
        """
        keeper = app._runtime._keeper
        self._shares.take(app.name, app._terms.num_sessions_max)
        try:
            if name is None:
                names = (f"session-{number}" for number in self._names)
                free = next(name for name in names if self._is_free(app, name))
                # Who gives this name to a session later means one that is kept, and no stranger's.
                talk = Talk(app, free, Conversation.begin(system), None, place=f"\0{free}")
            elif keeper is None:
                talk = Talk(app, name, Conversation.begin(system), None, place=name)
            else:
                talk = Talk(app, name, *keeper.open(app.name, name, system), place=name)
        except BaseException:
            self._shares.give_back(app.name)
            raise
        self._open[app.name, talk.place] = talk
        return talk

    def _is_free(self, app: "App", name: str) -> bool:
        """Whether nobody has this name, so that an unnamed session may bear it."""
        keeper = app._runtime._keeper
        is_open = (app.name, name) in self._open
        return not is_open and (keeper is None or not keeper.knows(app.name, name))

    def end_if_left(self, talk: Talk, *, whoever: bool = False) -> None:
        """End a talk that nobody has open, or `whoever` has."""
        if whoever or not talk.sessions:
            talk.end()
            if self._open.get((talk.app_name, talk.place)) is talk:
                del self._open[talk.app_name, talk.place]
                self._shares.give_back(talk.app_name)
