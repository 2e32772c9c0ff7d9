"""Stored sessions as lines of text and as JSON, and the options that choose among them. Pure."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekv.cli.render import TerminalText, one_line, size
from edgekv.config import GIB, check_float
from edgekv.errors import ConfigError
from edgekv.runtime.conversation import ChatMessage, stored_messages
from edgekv.store import StoredSession, StoreView

if TYPE_CHECKING:
    from edgekv.runtime import SessionInfo

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AGE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])")
_LABEL_WIDTH = 10


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A stored session, and the store that it stands in."""

    store: StoreView
    session: StoredSession

    @property
    def messages(self) -> tuple[ChatMessage, ...] | None:
        """What was said; None if it cannot be read."""
        return stored_messages(self.session.conversation)

    def facts(self) -> dict[str, Any]:
        """Plain values for JSON."""
        messages = self.messages
        return {
            "name": self.session.name,
            "app": self.session.app,
            "model": self.store.model,
            "num_messages": None if messages is None else len(messages),
            "num_tokens": self.session.num_tokens,
            "payload_bytes": self.session.payload_bytes,
            "created_s": self.session.created_s,
            "used_s": self.session.used_s,
        }

    def __str__(self) -> str:
        """Name, app and model on one line."""
        return one_line(f"{self.session.name} (app {self.session.app}, model {self.store.model})")


def ago(seconds: float) -> str:
    """How long something is past, as a person says it."""
    for unit, name in (("w", "week"), ("d", "day"), ("h", "hour"), ("m", "minute")):
        if (number := int(seconds // _UNITS_S[unit])) > 0:
            return f"{number} {name}{'s' if number > 1 else ''} ago"
    return "just now"


def parse_age(option: str, text: str) -> float:
    """Seconds of `90s`, `30m`, `12h`, `7d` or `2w`."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError.of(option, text, "a number and one of s, m, h, d, w, for example 7d")
    return float(match[1]) * _UNITS_S[match[2]]


def table(kept: Sequence[Kept], now_s: float) -> list[str]:
    """A line each under a line of headings, columns aligned."""
    rows = [("NAME", "APP", "MODEL", "MESSAGES", "TOKENS", "DISK", "LAST USED")]
    for one in kept:
        session, messages = one.session, one.messages
        rows.append(
            (
                one_line(session.name),
                one_line(session.app),
                one_line(one.store.model),
                "damaged" if messages is None else str(len(messages)),
                str(session.num_tokens),
                size(session.payload_bytes),
                ago(now_s - session.used_s),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, "<<<>>><", widths, strict=True)  # names to the left, figures to the right
        lines.append("  ".join([f"{text:{side}{width}}" for text, side, width in cells]).rstrip())
    return lines


def brief(sessions: "Sequence[SessionInfo]", here: str | None, now_s: float) -> list[str]:
    """One app's sessions, a line each; a star marks where one is."""
    width = max([len(one_line(info.name)) for info in sessions], default=0)
    lines = []
    for info in sessions:
        star = "*" if info.name == here else " "
        messages = "damaged" if info.num_messages is None else f"{info.num_messages} messages"
        when = ago(now_s - info.used_s)
        lines.append(f"{star} {one_line(info.name):<{width}}  {messages:>12}  {when}")
    return lines


def description(kept: Kept, now_s: float, *, on_terminal: bool) -> list[str]:
    """Everything about one session: facts, a blank line, then what was said.

    On a terminal control characters of messages are left out; a pipe gets them.
    """
    session = kept.session
    facts = {
        "name": session.name,
        "app": session.app,
        "model": kept.store.model,
        "created": _time(session.created_s),
        "last used": f"{_time(session.used_s)} ({ago(now_s - session.used_s)})",
        "on disk": f"KV of {session.num_tokens} tokens, {size(session.payload_bytes)}",
    }
    lines = [f"{label:<{_LABEL_WIDTH}} {one_line(text)}" for label, text in facts.items()]
    messages = kept.messages
    if messages is None:
        return [*lines, "", "(its messages cannot be read)"]
    for message in messages:
        text = TerminalText().feed(message.content) if on_terminal else message.content
        lines += ["", f"{message.role}: {text}"]
    return lines


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def total_line(kept: Sequence[Kept]) -> str:
    """How many, and what the files of their stores take."""
    folders = {one.store.folder: one.store.file_bytes for one in kept}
    number = f"{len(kept)} session{'' if len(kept) == 1 else 's'}"
    return f"{number}; files of {size(sum(folders.values()))} in " + ", ".join(
        one_line(str(folder)) for folder in sorted(folders)
    )


def choose(kept: Sequence[Kept], name: str) -> Kept:
    """The one session of this name; an error says that there is none, or which there are."""
    found = [one for one in kept if one.session.name == name]
    if not found:
        raise ConfigError(
            f"no session is called {name!r}", hint="edgekv sessions list shows their names"
        )
    if len(found) > 1:
        which = "; ".join(str(one) for one in found)
        raise ConfigError(
            f"{len(found)} sessions are called {name!r}: {which}",
            hint="say which one with --app and --model",
        )
    return found[0]


def to_prune(
    kept: Sequence[Kept], *, unused_s: float | None, keep_gib: float | None, now_s: float
) -> list[Kept]:
    """Which sessions go, of those that may.

    Those that were not used for `unused_s`; of the rest the least recently used, until their KV
    takes at most `keep_gib`.
    """
    keep_bytes, unused_s = math.inf, math.inf if unused_s is None else unused_s
    if keep_gib is not None:
        keep_bytes = check_float("keep-gib", keep_gib, 0.0, float(1 << 20)) * GIB
    going, total_bytes = [], 0
    for one in sorted(kept, key=lambda one: one.session.used_s, reverse=True):
        is_old = now_s - one.session.used_s >= unused_s
        if not is_old:
            total_bytes += one.session.payload_bytes
        if is_old or total_bytes > keep_bytes:
            going.append(one)
    return going
