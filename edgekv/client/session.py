"""A conversation that a daemon has."""

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Never

from edgekv.chat import wire
from edgekv.chat.values import ChatMessage, Completion
from edgekv.client.running import RemoteCompletion, Running
from edgekv.config import PREFILL_MODES, PrefillMode, SamplingParams, check_choice, check_kind
from edgekv.errors import ConfigError, EdgeKVError, PromptEmpty
from edgekv.runtime import session as local
from edgekv.runtime.reply import Reply, ReplyStream, RunningReply, in_thread
from edgekv.runtime.session import check_system
from edgekv.runtime.talk import closed_error
from edgekv.tokenizer.grammar import Grammar

if TYPE_CHECKING:
    from edgekv.client.app import App


class Session(local.Session):
    """A session of a daemon's: what it can do, the daemon does.

    What is said of it is asked each time, and once more when it is closed. One that is not kept
    ends with the last of its clients, with the daemon, or when nothing was asked in it for an hour.
    """

    def __init__(self, app: "App", name: str, token: str) -> None:
        """Made by `App.session`; `token` is that of a session without a name."""
        self.app: App = app
        self.name = name
        self.prefill: PrefillMode | None = None
        self._link = app.link
        self._place = {"name": name, "token": token}
        self._running: RunningReply | None = None
        self._closed = False
        self._left: dict[str, Any] | None = None  # how it was when it was closed
        self._dropped = weakref.finalize(
            self, app.link.post, "/edgekv/session/close", self._place, app=app.name
        )

    @property
    def messages(self) -> list[ChatMessage]:
        """The conversation so far."""
        return list(wire.load(tuple[ChatMessage, ...], self._look("messages"), "messages"))

    @property
    def system(self) -> str | None:
        """The system prompt, if there is one."""
        system = self._look("system")
        return None if system is None else str(system)

    @property
    def kept(self) -> bool:
        """Whether the conversation is stored, and found again by its name after a restart."""
        return bool(self._look("kept"))

    @property
    def warning(self) -> str:
        """What could not be read or kept of the conversation; "" if all is well."""
        return str(self._look("warning"))

    @property
    def last_reply(self) -> Reply | None:
        """The reply of the last request that ran, a cancelled one included."""
        reply: Reply | None = wire.load(Reply | None, self._look("last_reply"), "last_reply")
        return reply

    @property
    def busy(self) -> bool:
        """Whether it is answering, for one of those that have it open."""
        return bool(self._look("busy"))

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed or self._link.closed

    def prewarm(self, text: str | None = None) -> None:
        """Compute the KV of the conversation so far, and of a next turn's beginning, ahead."""
        if text is not None:
            check_kind("text", text, str, allowed="a string or None")
        self._ask("POST", "prewarm", text=text, prefill=self._mode(None))

    async def aprewarm(self, text: str | None = None) -> None:
        """`prewarm` for asyncio."""
        await in_thread(lambda: self.prewarm(text))

    def suspend(self) -> int:
        """Take the session's KV out of memory now; see `runtime.Session.suspend`."""
        return int(self._ask("PUT", "suspend")["num_tokens"])

    def clear(self, *, system: str | None = None) -> None:
        """Start the conversation anew; see `runtime.Session.clear`."""
        check_system(system)
        self._ask("PUT", "clear", system=system)

    def close(self) -> None:
        """End the session, and take back what it asked: what there was of an answer is kept."""
        self._link.home.check()
        if self._closed:
            return
        self._closed = True
        self._dropped.detach()
        if self._running is not None:
            self._running.finish()
        with contextlib.suppress(EdgeKVError):  # then it has ended all the same
            self._left = self._call("PUT", "close", {})

    def submit_ids(
        self,
        token_ids: Iterable[int],  # noqa: ARG002
        sampling: SamplingParams | None = None,  # noqa: ARG002
        *,
        prefill: PrefillMode | None = None,  # noqa: ARG002
        confirmed: bool = False,  # noqa: ARG002
        grammar: Grammar | None = None,  # noqa: ARG002
    ) -> ReplyStream:
        """Not over a daemon. Raises ConfigError."""
        return _only_here("submit_ids")

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None or self._link.home.is_here:
            self.close()

    def _check_open(self) -> None:
        self._link.home.check()
        if self._closed:
            raise closed_error(self.name)

    def _submit(
        self,
        text: str,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        prefill: PrefillMode | None = None,
        confirmed: bool = False,
        grammar: Grammar | None = None,
    ) -> Running:
        self._check_open()
        check_kind("text", text, str, allowed="a string")
        if sampling is not None:
            check_kind("sampling", sampling, SamplingParams, allowed="SamplingParams or None")
        check_kind("raw", raw, bool, allowed="True or False")
        check_kind("confirmed", confirmed, bool, allowed="True or False")
        if grammar is not None:
            check_kind("grammar", grammar, Grammar, allowed="a Grammar or None")
        mode = self._mode(prefill)
        if not text.strip():
            raise PromptEmpty("the prompt is empty", hint="say something")
        asked = {"text": text, "raw": raw, "prefill": mode, "confirmed": confirmed}
        values = {"sampling": wire.dump(sampling), "grammar": wire.dump(grammar)}
        body = {**self._place, **asked, **values}
        self._running = running = Running(self._link, self.app.name, "/edgekv/session/ask", body)
        if self._closed:  # meanwhile, by another thread, which may not have seen it
            running.finish()
        return running

    def _begin(self, asked: Completion) -> RemoteCompletion:
        if asked.prefill is None:
            asked = replace(asked, prefill=self._mode(None))
        body = {**self._place, "asked": wire.dump(asked)}
        self._running = running = Running(self._link, self.app.name, "/edgekv/complete", body)
        return RemoteCompletion(running)

    def _mode(self, asked: PrefillMode | None) -> PrefillMode | None:
        """As the request says, or the session, the app; None is as the daemon says."""
        choices = (asked, self.prefill, self.app.prefill)
        mode = next((choice for choice in choices if choice is not None), None)
        if mode is not None:
            check_choice("prefill", mode, PREFILL_MODES)
        return mode

    def _look(self, what: str) -> Any:
        if not self._closed:
            return self._call("PUT", "look", {})[what]
        if self._left is None:
            raise closed_error(self.name)
        return self._left[what]

    def _ask(self, method: str, operation: str, **more: Any) -> Any:
        self._check_open()
        return self._call(method, operation, more)

    def _call(self, method: str, operation: str, more: dict[str, Any]) -> Any:
        path = f"/edgekv/session/{operation}"
        return self._link.call(method, path, {**self._place, **more}, app=self.app.name)


def _only_here(what: str) -> Never:
    raise ConfigError(f"{what} is not for daemons", hint="edgekv.Runtime.open has it")
