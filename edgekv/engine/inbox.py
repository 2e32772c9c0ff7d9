"""From caller threads to the engine thread: messages, and who still waits for an answer."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from edgekv.config import Priority
from edgekv.engine.outbox import Failed
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.shares import Shares
from edgekv.errors import EdgeKVError, QueueFull
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
    """What an app may have from now on.

    Attributes:
        num_waiting_max: Requests submitted and not finished; None: see `Shares`.
        num_sessions_max: Open sessions; the same.
    """

    name: str
    weight: float = 1.0
    priority: Priority = "interactive"
    pinned_bytes: int = 0
    num_waiting_max: int | None = None
    num_sessions_max: int | None = None

    @property
    def usual(self) -> bool:
        """Whether these are the terms of an app that nobody said anything of."""
        return self == AppTerms(self.name)


@dataclass(frozen=True)
class ForgetApp:
    """An app was closed: it has the usual terms, and is gone once it owes nothing."""

    name: str


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


@dataclass(frozen=True)
class AppNews:
    """Something was said of apps; the inbox knows what."""


OfApp = AppTerms | ForgetApp
Notice = OfApp | Call | Cancel | CloseSession | IoReady | Pressure | Shutdown  # needs no answer
Message = Submit | Suspend | Notice


# Of the messages that wait, so many are taken at once: a request that comes takes 50 us, and of a
# crowd of them every stream would see a gap. What is said of an app takes 2 us.
MESSAGES_MAX = 256
NEWS_MAX = 1024
ANYBODY = ""  # no app's name: one of those with the usual terms


class Inbox:
    """Messages to the engine. Any thread may put; the engine thread alone takes.

    It knows the outboxes of all unfinished requests, so that none of their callers waits for a
    thread that is gone. What changes nothing is no message: the usual terms of an app that has
    them already, the end of one that never asked, or of a request that has ended.
    """

    def __init__(self, num_requests_max: int) -> None:
        self._messages: queue.SimpleQueue[Message | AppNews] = queue.SimpleQueue()
        # Guards what follows. Reentrant: the garbage collector may drop a stream inside it, and a
        # stream that is dropped is taken back.
        self._lock = threading.RLock()
        self._unfinished: dict[RequestId, Request] = {}
        self._untold: dict[RequestId, Request] = {}  # they have ended, and nobody knows yet
        self._taken_back: set[RequestId] = set()  # of which `Cancel` was posted
        self._shares = Shares(
            num_requests_max,
            error=QueueFull,
            what="requests are waiting or running",
            limit="num_waiting_max",
            remedy="wait for some to finish",
        )
        self._apps: dict[str, AppTerms] = {}  # of those whose terms are not the usual ones
        self._asked: set[str] = set()  # apps that submitted something
        self._news: dict[str, OfApp] = {}  # the last that wait, by app
        self._ending = False
        self._failure: EdgeKVError | None = None

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return len(self._unfinished)

    def submit(self, request: Request) -> None:
        """Queue a request; its events come through its outbox.

        Raises:
            QueueFull: Too many requests are unfinished, of its app or of all.
            RuntimeClosed, EngineFailed: The engine has ended.
        """
        app = request.session.app
        with self._lock:
            self._raise_if_ended()
            terms = self._apps.get(app)
            self._shares.take(app, None if terms is None else terms.num_waiting_max)
            request.session.asked = True
            self._asked.add(app)
            self._unfinished[request.request_id] = request
            self._messages.put(Submit(request))

    def post(self, message: Notice) -> None:
        """Queue a message that needs no answer; after the end it is ignored.

        Of an app the last that was said waits, once, and in nobody's way: who changes terms in a
        loop would fill the queue faster than it is emptied. Looking at names says nothing of them.
        """
        match message:
            case AppTerms() | ForgetApp():
                with self._lock:
                    self._say(message)
                return
            case Cancel(request_id):
                with self._lock:
                    if request_id not in self._unfinished or request_id in self._taken_back:
                        return
                    self._taken_back.add(request_id)
            case Shutdown():
                self._ending = True
        self._messages.put(message)

    def _say(self, news: OfApp) -> None:
        """Queue what is said of an app, if it is anything new; inside the lock."""
        known = self._apps.pop(news.name, None) is not None or news.name in self._news
        if isinstance(news, ForgetApp):
            if not known and news.name not in self._asked:
                return
            self._asked.discard(news.name)
        elif not news.usual:
            self._apps[news.name] = news
        elif not known:
            news = AppTerms(ANYBODY)
        if not self._news:
            self._messages.put(AppNews())
        self._news[news.name] = news

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
        """The first messages that wait now; with `block`, after waiting for one.

        What comes meanwhile is left for the next time, so that callers who never stop asking
        cannot keep steps from running. Only one thread takes.
        """
        num_waiting = self._messages.qsize()
        if not self._ending:
            num_waiting = min(num_waiting, MESSAGES_MAX)
        for _ in range(max(num_waiting, int(block))):
            message = self._messages.get()
            if isinstance(message, AppNews):
                yield from self._take_news()
                continue
            if isinstance(message, Submit):  # by the terms that were given before
                yield from self._take_news(message.request.session.app)
            yield message

    def _take_news(self, app: str | None = None) -> list[OfApp]:
        """What was said of an app, or of the first that something was said of."""
        with self._lock:
            if app is not None:
                return [self._news.pop(app)] if app in self._news else []
            names = list(itertools.islice(self._news, NEWS_MAX))
            news = [self._news.pop(name) for name in names]
            if self._news:
                self._messages.put(AppNews())
            return news

    def finished(self, request_id: RequestId) -> None:
        """A request has ended; its caller is told by somebody else, who says so by `told`."""
        with self._lock:
            self._taken_back.discard(request_id)
            request = self._unfinished.pop(request_id, None)
            if request is not None:
                self._untold[request_id] = request
                self._shares.give_back(request.session.app)

    def told(self, request_id: RequestId) -> None:
        """The caller of a request knows that it has ended."""
        with self._lock:
            self._untold.pop(request_id, None)

    def end(self, failure: EdgeKVError) -> None:
        """Nothing is taken any more: fail all whose callers wait, and all that come."""
        with self._lock:
            self._failure = failure
            requests = [*self._unfinished.values(), *self._untold.values()]
            self._unfinished.clear()
            self._untold.clear()
        for request in requests:
            request.outbox.put(Failed(error=failure))

    def _raise_if_ended(self) -> None:
        if self._failure is not None:
            # One error for all callers: it must not collect a traceback of each.
            raise self._failure.with_traceback(None)
