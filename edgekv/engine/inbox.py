"""From caller threads to the engine thread: messages, and who still waits for an answer."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from edgekv.config import Priority
from edgekv.engine.outbox import Failed, Outbox
from edgekv.engine.request import EngineSession, Request
from edgekv.errors import EdgeKVError, QueueFull, RuntimeClosed
from edgekv.ids import RequestId

T = TypeVar("T")


@dataclass(frozen=True)
class Submit:
    """A new request. Of the messages it alone has a step planned anew that was prepared before."""

    request: Request


@dataclass(frozen=True)
class Cancel:
    """Somebody no longer wants the answer."""

    request_id: RequestId


@dataclass(frozen=True)
class CloseSession:
    """A session's KV is no longer needed."""

    session: EngineSession


@dataclass(frozen=True)
class Call:
    """Something to run on the engine thread between two turns; no plan depends on it."""

    run: Callable[[], None]


@dataclass(frozen=True)
class Suspend:
    """A session leaves memory if it is idle.

    `told` is given how many of its tokens are on disk once nothing of it is on its way.
    """

    session: EngineSession
    told: "Future[int]"


@dataclass(frozen=True)
class AppTerms:
    """What an app may have from now on."""

    name: str
    weight: float
    priority: Priority
    pinned_bytes: int


@dataclass(frozen=True)
class IoReady:
    """Some I/O has ended: there is something to collect."""


@dataclass(frozen=True)
class Pressure:
    """The system's memory: which fraction of the pool sessions should own at most."""

    fraction: float


@dataclass(frozen=True)
class Shutdown:
    """The end."""


Notice = AppTerms | Cancel | CloseSession | IoReady | Pressure | Shutdown  # needs no answer
Message = Submit | Call | Suspend | Notice


class Inbox:
    """Messages to the engine. Any thread may put; the engine thread alone takes.

    It knows the outboxes of all unfinished requests, so that none of their callers waits for a
    thread that is gone.
    """

    def __init__(self, num_requests_max: int) -> None:
        self._num_requests_max = num_requests_max
        self._process_id = os.getpid()
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._unfinished: dict[RequestId, Outbox] = {}
        self._terms: dict[str, AppTerms] = {}  # the last that wait, by app
        self._failure: EdgeKVError | None = None

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return len(self._unfinished)

    def submit(self, request: Request) -> None:
        """Queue a request; its events come through its outbox.

        Raises:
            QueueFull: Too many requests are unfinished.
            RuntimeClosed, EngineFailed: The engine has ended.
        """
        self._raise_if_forked()
        with self._lock:
            self._raise_if_ended()
            if len(self._unfinished) >= self._num_requests_max:
                raise QueueFull(
                    f"{len(self._unfinished)} requests are waiting or running",
                    hint="wait for some to finish, or raise num_waiting_max",
                )
            self._unfinished[request.request_id] = request.outbox
            self._messages.put(Submit(request))

    def post(self, message: Notice) -> None:
        """Queue a message that needs no answer; after the end it is ignored.

        An app's terms wait once, however often they are changed: who does so in a loop would fill
        the queue faster than it is emptied.
        """
        if isinstance(message, AppTerms):
            with self._lock:
                waits = message.name in self._terms
                self._terms[message.name] = message
            if waits:
                return
        self._messages.put(message)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the engine thread and return what it returns.

        Raises:
            RuntimeClosed, EngineFailed: The engine has ended.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except (EdgeKVError, AssertionError) as error:
                future.set_exception(error)

        return self.ask(Call(run), future)

    def ask(self, question: Call | Suspend, answer: "Future[T]") -> T:
        """Queue a question and wait for its answer; raises as `call` does."""
        self._raise_if_forked()
        with self._lock:
            self._raise_if_ended()
            self._messages.put(question)
        while True:
            try:
                return answer.result(timeout=1.0)
            except TimeoutError:
                with self._lock:
                    self._raise_if_ended()

    def take(self, *, block: bool) -> Iterator[Message]:
        """The messages that wait now; with `block`, after waiting for a first one.

        What comes meanwhile is left for the next time, so that callers who never stop asking
        cannot keep steps from running. Only one thread takes.
        """
        for _ in range(max(self._messages.qsize(), int(block))):
            message = self._messages.get()
            if isinstance(message, AppTerms):
                with self._lock:
                    message = self._terms.pop(message.name)
            yield message

    def finished(self, request_id: RequestId) -> None:
        """A request has ended; its caller is told by somebody else."""
        with self._lock:
            self._unfinished.pop(request_id, None)

    def end(self, failure: EdgeKVError) -> None:
        """Nothing is taken any more: fail all unfinished requests, and all that come."""
        with self._lock:
            self._failure = failure
            outboxes = list(self._unfinished.values())
            self._unfinished.clear()
        for outbox in outboxes:
            outbox.put(Failed(error=failure))

    def _raise_if_forked(self) -> None:
        # A forked process has no engine thread, and perhaps a lock that nobody will release.
        if os.getpid() != self._process_id:
            raise RuntimeClosed(
                f"the runtime belongs to process {self._process_id}, which forked this one",
                hint="open a runtime in this process, and start processes by 'spawn'",
            )

    def _raise_if_ended(self) -> None:
        if self._failure is not None:
            # One error for all callers: it must not collect a traceback of each.
            raise self._failure.with_traceback(None)
