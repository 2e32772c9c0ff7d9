"""Named sessions' conversations between the runtime and the store."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from edgekv.errors import ConfigError, EdgeKVError, NotKept, StoreError, StoreStale
from edgekv.models.fingerprint import is_of_this_release
from edgekv.runtime.conversation import Conversation, dump, load, opening, stored_messages
from edgekv.store import Store

NAMES_MAX = 8  # of sessions that an error names


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """A named session as it is stored.

    Attributes:
        name: Its name within its app.
        num_messages: The system prompt included; None if they cannot be read.
        num_tokens: Tokens whose KV is on disk.
        payload_bytes: Of that KV; what it shares with other sessions is counted in each.
        created_s: Unix time.
        used_s: Unix time of its last turn.
        is_begun: Something was said or set in it once.
    """

    name: str
    num_messages: int | None
    num_tokens: int
    payload_bytes: int
    created_s: float
    used_s: float
    is_begun: bool


class ConversationKeeper:
    """Brings conversations to the store, the newest of each session, one write at a time.

        note   what is said now, in the order in which it is said     waits for nobody
        save   the newest of it is on disk when this returns          waits for the disk

    Owned by the runtime; any thread may call it. Who gets a reply gets it behind `save`, so what
    was returned survives a kill. A write that fails leaves the conversation here, where the
    session's next turn takes it along, a session that is opened again finds it, and `flush` tries
    once more.
    """

    def __init__(
        self,
        store: Store,
        *,
        vocab_size: int,
        gone: Callable[[str, str], None] = lambda _app, _name: None,
    ) -> None:
        """`gone` is told of an app's session when its KV must be on no disk any more."""
        self._store = store
        self._gone = gone
        self._vocab_size = vocab_size
        self._turn = threading.Lock()  # of whoever writes
        self._lock = threading.Lock()  # guards what follows
        self._unsaved: dict[int, Conversation] = {}
        self._saved: set[int] = set()  # keys of sessions used here that are in the store
        self._taken_back: set[int] = set()  # of which something was
        self._failures: dict[int, str] = {}

    def open(self, app: str, name: str, system: str | None) -> tuple[Conversation, "KeptSession"]:
        """What a named session begins with, and where it is kept from now on. Reads the store."""
        key = self._store.session(app, name, persistent=True).key
        with self._lock:
            unsaved = self._unsaved.get(key)
        # Read now: what was still unsaved before may have been written before that look.
        stored = self._store.session(app, name, persistent=True)
        conversation, damage = unsaved or Conversation(), ""
        if unsaved is None and stored.conversation is not None:
            conversation, damage = load(stored.conversation, vocab_size=self._vocab_size)
            with self._lock:
                self._saved.add(stored.key)
        usable = stored.resume_point(stored.num_tokens)
        kept = KeptSession(
            keeper=self,
            key=stored.key,
            damage=damage,
            token_ids=tuple(stored.token_ids[:usable]),
            state_ends=tuple(stored.state_ends),
        )
        return opening(name, system, conversation), kept

    def knows(self, app: str, name: str) -> bool:
        """Whether a session of this name is stored."""
        return self._store.find(app, name) is not None

    def sessions(self, app: str) -> list[SessionInfo]:
        """The app's named sessions, the one used last first. Reads the store."""
        with self._lock:  # before the store is read: what is written meanwhile is found there
            unsaved = {key: said.messages for key, said in self._unsaved.items()}
        infos = []
        for stored in self._store.sessions():
            if stored.app != app or not stored.persistent:
                continue
            messages = unsaved.get(stored.key, stored_messages(stored.conversation))
            infos.append(
                SessionInfo(
                    name=stored.name,
                    num_messages=None if messages is None else len(messages),
                    num_tokens=stored.num_tokens,
                    payload_bytes=stored.payload_bytes,
                    created_s=stored.created_s,
                    used_s=stored.used_s,
                    is_begun=stored.conversation is not None or stored.key in unsaved,
                )
            )
        return infos

    def remove(self, app: str, name: str) -> bool:
        """Forget a session, what was said and its KV; False if it is not stored."""
        stored = self._store.find(app, name)
        if stored is None:
            return False
        self._drop(stored.key)
        self._gone(app, name)
        self._store.remove(stored.key)
        return True

    def note(self, key: int, conversation: Conversation, before: Conversation) -> None:
        """From now on this is the newest of a session, and `before` was; for `save` to write."""
        self._store.touch(key)
        with self._lock:
            self._unsaved[key] = conversation
            if conversation.messages[: len(before.messages)] != before.messages:
                self._taken_back.add(key)

    def save(self, key: int) -> None:
        """Write what was noted of a session; that it cannot be written says `KeptSession.warning`.

        An error that nobody foresaw is raised, and the conversation stays here all the same.
        """
        with self._turn:
            with self._lock:
                conversation, taken_back = self._unsaved.get(key), key in self._taken_back
            if conversation is None:  # somebody has taken it along, or the session was removed
                return
            failure = "an error in edgekv"
            if taken_back and (stored := self._store.lookup(key)) is not None:
                self._gone(stored.app, stored.name)
            try:
                self._store.set_conversation(key, dump(conversation), taken_back=taken_back)
                failure = ""
            except StoreStale:  # the session was removed
                self._drop(key)
            except (EdgeKVError, OSError) as error:
                failure = str(error)
            finally:
                self._note_end(key, conversation, failure)

    def _note_end(self, key: int, conversation: Conversation, failure: str) -> None:
        with self._lock:
            if self._unsaved.get(key) is not conversation:
                return  # something newer was noted, and whoever did so saves it
            if failure:
                self._failures[key] = failure
                return
            self._saved.add(key)
            del self._unsaved[key]
            self._taken_back.discard(key)
            self._failures.pop(key, None)

    def _drop(self, key: int) -> None:
        with self._lock:
            self._saved.discard(key)
            self._unsaved.pop(key, None)
            self._taken_back.discard(key)
            self._failures.pop(key, None)

    def flush(self) -> None:
        """Try once more to write what is left.

        Raises:
            NotKept: What was said in some sessions is on no disk.
        """
        with self._lock:
            keys = list(self._unsaved)
        with contextlib.ExitStack() as all_of_them:  # whatever one of them raises
            for key in keys:
                all_of_them.callback(self.save, key)
        lost = self._store.why_lost()
        with self._lock:
            failures = {key: self._failures.get(key, "") for key in self._unsaved}
            if lost:
                failures = dict.fromkeys(self._unsaved.keys() | self._saved, lost)
        if failures:
            names = [repr(found.name) for key in failures if (found := self._store.lookup(key))]
            sessions = f"{len(failures)} session{'' if len(failures) == 1 else 's'}"
            what = "what was said in" if lost else "the last turns of"
            raise NotKept(
                f"{what} {sessions} cannot be kept ({', '.join(sorted(names)[:NAMES_MAX])}): "
                f"{next(iter(failures.values()))}"
            )


@dataclass(frozen=True, kw_only=True)
class KeptSession:
    """One session's place at the keeper.

    Attributes:
        keeper: Who brings its conversation to the store.
        key: The session's key in the store.
        damage: What could not be read when it was opened; "" if it was whole.
        token_ids: Tokens whose KV was on disk when it was opened.
        state_ends: Behind how many of them a state was, too, where layers have one.
    """

    keeper: ConversationKeeper
    key: int
    damage: str = ""
    token_ids: tuple[int, ...] = ()
    state_ends: tuple[int, ...] = ()

    def note(self, conversation: Conversation, before: Conversation) -> None:
        """See `ConversationKeeper.note`."""
        self.keeper.note(self.key, conversation, before)

    def save(self) -> None:
        """See `ConversationKeeper.save`."""
        self.keeper.save(self.key)

    def touch(self) -> None:
        """The session is used now."""
        self.keeper._store.touch(self.key)

    @property
    def found_again(self) -> bool:
        """Whether what is stored of it will be found by its name after a restart."""
        return not self.keeper._store.why_lost()

    @property
    def warning(self) -> str:
        """What its user should know, as one line; "" if all is well."""
        if lost := self.keeper._store.why_lost():
            return f"it is not kept: {lost}"
        failure = self.keeper._failures.get(self.key)
        return f"its last turns are not kept: {failure}" if failure else self.damage


def carry_over(store: Store, *, is_place: bool) -> None:
    """Bring here what was said under an earlier fingerprint of the same model; its KV is a miss.

    That is a store of the same model's name and KV per token. Where the name is a path
    (`is_place`), and so may mean another model in another folder, only a fingerprint of an earlier
    release counts. What has a namesake here stays there.
    """
    for view in Store.open_readonly(store.folder.parent):
        is_earlier = view.folder != store.folder and view.model == store.model
        is_earlier &= not is_place or not is_of_this_release(view.fingerprint)
        if not is_earlier or view.token_bytes != store.token_bytes or not view.sessions:
            continue
        left_there = contextlib.suppress(StoreError, ConfigError, OSError)
        with left_there, contextlib.closing(Store.reopen(view)) as earlier:
            for old in reversed(earlier.sessions()):  # the last one used comes last
                if store.take_over(old, _messages_alone(old.conversation)):
                    earlier.forget(old.key)


def _messages_alone(text: str | None) -> str | None:
    """A stored conversation without its tokens, which another tokenizer may have made."""
    messages = stored_messages(text)
    return text if text is None or messages is None else dump(Conversation(messages=messages))
