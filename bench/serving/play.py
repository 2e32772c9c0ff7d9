"""Scripts played on a server: at their times, whoever is late, or as fast as it answers."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from edgekv.bench.figures import Stopwatch
from edgekv.bench.serving.client import Client, Message
from edgekv.bench.serving.schedule import Scripted, TextScale, text_of
from edgekv.bench.serving.stream import Answer

PAST = -1  # the turn in which a conversation's past is said, before the clock starts
_PAST_TOKENS = 8  # of the answer to it
_QUESTION = "\nGo on with this story, at length."
_TIMEOUT_S = 600.0  # where no window ends


@dataclass(frozen=True, kw_only=True)
class Served:
    """A request that was sent, and what came of it."""

    app: str
    name: str  # of its conversation
    turn: int  # in it, from 0 on; or PAST
    due_ms: float  # when it should have been sent, by the play's clock
    sent_ms: float  # when it was
    answer: Answer

    @property
    def late_ms(self) -> float:
        """Sent after its time, because the answer before was late, or the client itself."""
        return max(0.0, self.sent_ms - self.due_ms)


class Player:
    """Holds conversations over one client. Owned by one event loop.

    `salt` makes texts unlike those of plays with another one, of which a server may still have KV.
    """

    def __init__(
        self,
        client: Client,
        scale: TextScale,
        *,
        salt: str = "",
        served: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._scale = scale
        self._salt = salt
        self._told = served
        self._watch = Stopwatch()

    async def play_open(
        self, script: Sequence[Scripted], *, window_s: float, drain_s: float
    ) -> list[Served]:
        """Send every turn that is due within the window; then wait for answers for a while.

        What was said before the play is said first, before the clock starts.
        """
        pasts = [await self._say_past(each) for each in script]
        found = [said for said, _ in pasts if said is not None]
        self._watch = Stopwatch()
        end_ms = 1e3 * (window_s + drain_s)
        talks = [
            self._talk(each, history, until_ms=1e3 * window_s, end_ms=end_ms)
            for each, (_, history) in zip(script, pasts, strict=True)
            if history is not None
        ]
        return [*found, *await _gathered(talks)]

    async def play_closed(
        self, mix: Iterator[Scripted], *, num_users: int, for_s: float
    ) -> tuple[list[Served], float]:
        """So many users, one conversation after the other without a pause, until time is up.

        Returns also the seconds until the last of them has its answer.
        """
        self._watch = Stopwatch()
        until_ms = 1e3 * for_s
        end_ms = until_ms + 1e3 * _TIMEOUT_S

        async def user() -> list[Served]:
            found: list[Served] = []
            while self._watch.ms() < until_ms:
                found += await self._talk(
                    next(mix), [], until_ms=until_ms, end_ms=end_ms, paced=False
                )
                if found and found[-1].answer.fault is not None:  # at once and for ever, perhaps
                    break
            return found

        found = await _gathered([user() for _ in range(num_users)])
        return found, 1e-3 * self._watch.ms()

    async def ask_once(self, app: str, name: str, num_chars: int, max_tokens: int) -> Answer:
        """A single question about so many characters of text, at once."""
        asked = [self._message(name, num_chars)]
        return await self._client.ask(app, asked, max_tokens, _TIMEOUT_S)

    async def _say_past(self, each: Scripted) -> tuple[Served | None, list[Message] | None]:
        """A conversation so far; None for one that could not be said."""
        num_tokens = each.talk.num_past_tokens
        if not num_tokens:
            return None, []
        num_chars = self._scale.num_chars(num_tokens - _PAST_TOKENS)
        message = self._message(f"{each.name} past", num_chars)
        answer = await self._client.ask(each.app, [message], _PAST_TOKENS, _TIMEOUT_S)
        said = Served(
            app=each.app,
            name=each.name,
            turn=PAST,
            due_ms=0.0,
            sent_ms=0.0,
            answer=answer,
        )
        return said, None if answer.fault else [message, _assistant(answer.text)]

    async def _talk(
        self,
        each: Scripted,
        history: list[Message],
        *,
        until_ms: float,
        end_ms: float,
        paced: bool = True,
    ) -> list[Served]:
        """Turns as they are due, or else without a pause, as long as one may be sent.

        Ends at the first that fails. Who waits at `end_ms` waits no longer.
        """
        found = []
        for number, (turn, due_ms) in enumerate(zip(each.talk.turns, each.due_ms(), strict=True)):
            now_ms = self._watch.ms()
            if not paced:
                due_ms = now_ms
            if max(due_ms, now_ms) >= until_ms:
                break
            await asyncio.sleep(1e-3 * max(0.0, due_ms - now_ms))
            num_chars = self._scale.num_chars(turn.input_tokens)
            history.append(self._message(f"{each.name} {number}", num_chars))
            sent_ms = self._watch.ms()
            left_s = 1e-3 * (end_ms - sent_ms)
            answer = await self._client.ask(each.app, history, turn.output_tokens, left_s)
            self._told()
            found.append(
                Served(
                    app=each.app,
                    name=each.name,
                    turn=number,
                    due_ms=due_ms,
                    sent_ms=sent_ms,
                    answer=answer,
                )
            )
            if answer.fault is not None:
                break
            history.append(_assistant(answer.text))
        return found

    def _message(self, name: str, num_chars: int) -> Message:
        text = text_of(f"{self._salt} {name}", num_chars)
        return {"role": "user", "content": text + _QUESTION}


async def _gathered(parts: Sequence[Awaitable[list[Served]]]) -> list[Served]:
    return [served for part in await asyncio.gather(*parts) for served in part]


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
