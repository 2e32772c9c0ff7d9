"""An app of a daemon's."""

from dataclasses import replace
from typing import Any, Unpack
from weakref import WeakSet

from edgekv.chat import wire
from edgekv.chat.values import Completion
from edgekv.client.link import Link
from edgekv.client.running import RemoteCompletion, Running
from edgekv.client.session import Session
from edgekv.config import PREFILL_MODES, PrefillMode, Priority, check_choice, check_kind
from edgekv.errors import ConfigError, RuntimeClosed
from edgekv.runtime import app as local
from edgekv.runtime.app import Terms, check_name, checked
from edgekv.runtime.keeper import SessionInfo
from edgekv.runtime.session import check_system


class App(local.App):
    """Who owns sessions at a daemon. Its terms are those of its key: `edgekv apps set`."""

    def __init__(self, link: Link, terms: dict[str, Any]) -> None:
        """Made by `Connection.app`; `terms` as the daemon says them."""
        self.link = link
        self._told = terms
        self._mode: PrefillMode | None = None
        self._closed = False
        self._sessions: WeakSet[Session] = WeakSet()

    @property
    def name(self) -> str:
        """Its name."""
        return str(self._told["app"])

    @property
    def weight(self) -> float:
        """Its share relative to apps of the same class."""
        return float(self._told["weight"])

    @property
    def priority(self) -> Priority:
        """Its class; "interactive" goes before "background"."""
        priority: Priority = self._told["priority"]
        return priority

    @property
    def pinned_bytes(self) -> int:
        """KV memory that no other app can take from its sessions."""
        return int(self._told["pinned_bytes"])

    @property
    def prefill(self) -> PrefillMode | None:
        """Whether prompts' KV is predicted, where neither request nor session says; of these.

        None leaves it to the daemon.
        """
        return self._mode

    @prefill.setter
    def prefill(self, mode: PrefillMode | None) -> None:
        if mode is not None:
            check_choice("prefill", mode, PREFILL_MODES)
        self._mode = mode

    def update(self, **terms: Unpack[Terms]) -> None:
        """Set `prefill`; the other terms are its key's. Raises ConfigError if they would change."""
        given = checked(terms)
        mode = given.pop("prefill", self._mode)
        for field, value in given.items():
            if value != self._told.get(field):
                raise ConfigError(
                    f"{field} is {self._told.get(field)!r} at this daemon, and not {value!r}",
                    hint=f"edgekv apps add, or set, {self.name} says what it may have",
                )
        self._mode = mode

    def session(self, name: str | None = None, *, system: str | None = None) -> Session:
        """Open a session; see `runtime.App.session`."""
        if name is not None:
            check_name("session name", name)
        check_system(system)
        opened = self._call("open", name=name, system=system)
        session = Session(self, opened["name"], opened["token"])
        self._sessions.add(session)
        return session

    def _begin(self, asked: Completion, *, aside: bool = False) -> RemoteCompletion:
        self._check_open()
        check_kind("asked", asked, Completion)
        if asked.prefill is None:
            asked = replace(asked, prefill=self._mode)
        body = {"asked": wire.dump(asked), "aside": aside}
        return RemoteCompletion(Running(self.link, self.name, "/edgekv/complete", body))

    def knows(self, name: str) -> bool:
        """Whether a session of this name is open or stored."""
        return bool(self._call("knows", name=name)["known"])

    def sessions(self) -> list[SessionInfo]:
        """Its named sessions that are stored, open or not, the one used last first."""
        told = self._call("list")["sessions"]
        return list(wire.load(tuple[SessionInfo, ...], told, "sessions"))

    def remove(self, name: str) -> bool:
        """Close the sessions of this name, and forget what was said in them and its KV."""
        check_name("session name", name)
        return bool(self._call("remove", name=name)["removed"])

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed or self.link.closed

    def close(self) -> None:
        """Close the sessions that were opened by it: what they said stays stored."""
        self.link.home.check()
        self._closed = True
        for session in list(self._sessions):
            session.close()

    def forget(self) -> None:
        """`close`, and remove all that is stored of its sessions: what was said, and KV."""
        names = [info.name for info in self.sessions()]
        for name in names:
            self.remove(name)
        self.close()

    def _check_open(self) -> None:
        self.link.home.check()
        if self._closed:
            raise RuntimeClosed(f"app {self.name!r} was closed", hint="open it again: app")

    def _call(self, operation: str, **body: Any) -> Any:
        self._check_open()
        return self.link.call("PUT", f"/edgekv/session/{operation}", body, app=self.name)
