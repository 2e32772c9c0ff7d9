"""Requests that a daemon answers, as the runtime's streams read them."""

from dataclasses import dataclass
from typing import Any

from edgekv.chat import wire
from edgekv.chat.events import Begun, Event, Failed, Finished, Progress
from edgekv.client.link import Link
from edgekv.engine import outbox
from edgekv.engine.outbox import Delta, Outbox
from edgekv.errors import EdgeKVError
from edgekv.runtime.reply import Reply, RunningReply


@dataclass(frozen=True, kw_only=True)
class EventDelta(Delta):
    """What happened in a completion, on its way to whoever reads it."""

    text: str = ""
    event: Event


class _Reader:
    """Lines of an answer → the outbox that streams read."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.finished: Finished | None = None

    def take(self, line: dict[str, Any]) -> bool:
        """See `link.Reader`."""
        match wire.load(Delta | Reply | Event, line):
            case Progress(num_done=num_done, num_prompt=num_prompt):
                self.outbox.prefill_progress = (num_done, num_prompt)
                return False
            case Delta() as delta:
                self.outbox.put(delta)
                return False
            case Failed(error=error):
                self.fail(error)
            case Reply() as reply:
                self.outbox.put(
                    outbox.Finished(
                        finish_reason=reply.finish_reason,
                        stats=reply.stats,
                        gaps_ms=reply.gaps_ms,
                        stop=reply.stop,
                    )
                )
            case Finished(reason=reason, stats=stats) as finished:
                self.finished = finished
                ended = "stop" if reason == "tool_calls" else reason
                self.outbox.put(outbox.Finished(finish_reason=ended, stats=stats))
            case event:
                self.outbox.put(EventDelta(event=event))
                return False
        return True

    def fail(self, error: EdgeKVError) -> None:
        """See `link.Reader`."""
        self.outbox.put(outbox.Failed(error=error))


class Running(RunningReply):
    """A request that a daemon answers."""

    def __init__(self, link: Link, app: str, path: str, body: Any) -> None:
        """Ask it. Raises what the daemon raises, DaemonGone."""
        self._reader = _Reader()
        request, line = link.begin(path, body, app=app, reader=self._reader)
        begun: Begun = wire.load(Begun, line)
        self.num_prompt = begun.num_prompt
        waits = self._reader.outbox
        waits.prefill_progress = (waits.prefill_progress[0], begun.num_prompt)
        super().__init__(
            waits,
            lambda: link.post("/edgekv/cancel", {"request": request}, app=app),
            lambda _reply: None,
            lambda: None,
            link.home,
        )

    @property
    def finished(self) -> Finished:
        """The end of a completion, once it has one."""
        assert self._reader.finished is not None
        return self._reader.finished


class RemoteCompletion:
    """A completion that a daemon answers; see `runtime.completions.Begins`."""

    session = None

    def __init__(self, running: Running) -> None:
        self.running = running
        self.num_prompt = running.num_prompt

    def events_of(self, delta: Delta) -> list[Event]:
        """The one that it holds."""
        assert isinstance(delta, EventDelta)
        return [delta.event]

    def end(self, _reply: Reply) -> list[Event]:
        """The end of the answer."""
        return [self.running.finished]
