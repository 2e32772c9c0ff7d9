"""`edgekv sessions`: what is kept of conversations, of all models, and how to get rid of it."""

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekv.cli.options import Json
from edgekv.cli.progress import say
from edgekv.cli.render import TerminalText, one_line, size
from edgekv.config import GIB, check_float
from edgekv.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from edgekv.runtime import ChatMessage, SessionInfo
    from edgekv.store import StoredSession, StoreView

sessions_app = typer.Typer(
    help="List, show and remove the conversations that are kept.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

_App = Annotated[str | None, typer.Option("--app", help="Only of this app.")]
_Model = Annotated[str | None, typer.Option("--model", "-m", help="Only of this model.")]

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AGE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])")
_LABEL_WIDTH = 10


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A stored session, and the store that it stands in."""

    store: "StoreView"
    session: "StoredSession"

    @property
    def messages(self) -> "tuple[ChatMessage, ...] | None":
        """What was said; None if it cannot be read."""
        from edgekv.runtime.conversation import stored_messages

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


def _shown(message: "ChatMessage") -> dict[str, Any]:
    """A message without what it does not say."""
    return {n: v for n, v in asdict(message).items() if v or n == "content"}


@sessions_app.command("list")
def list_sessions(app: _App = None, model: _Model = None, as_json: Json = False) -> None:
    """List sessions, the one used last first. Works beside a program that uses them."""
    kept = stored_sessions(app=app, model=model)
    if as_json:
        print(json.dumps({"sessions": [one.facts() for one in kept]}))
    elif kept:
        print("\n".join(table(kept, time.time())), flush=True)
        say(total_line(kept))
    else:
        say("No session is kept.")


@sessions_app.command()
def show(
    name: Annotated[str, typer.Argument(help="The session's name.")],
    app: _App = None,
    model: _Model = None,
    as_json: Json = False,
) -> None:
    """Show what was said in a session, and what of it is on disk."""
    one = choose(stored_sessions(app=app, model=model), name)[0]
    if as_json:
        said = None if one.messages is None else [_shown(message) for message in one.messages]
        print(json.dumps({**one.facts(), "messages": said}))
        return
    print("\n".join(description(one, time.time(), on_terminal=sys.stdout.isatty())))


@sessions_app.command()
def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The sessions' names.")],
    app: _App = None,
    model: _Model = None,
    as_json: Json = False,
) -> None:
    """Remove sessions: what was said in them, and their KV."""
    kept = stored_sessions(app=app, model=model)
    chosen = [one for name in dict.fromkeys(names) for one in choose(kept, name)]
    _remove(chosen, as_json=as_json)


@sessions_app.command()
def prune(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Not used for so long: 90s, 30m, 12h, 7d, 2w.")
    ] = None,
    keep_gib: Annotated[
        float | None,
        typer.Option(help="The least recently used, until the rest's KV takes no more."),
    ] = None,
    app: _App = None,
    model: _Model = None,
    as_json: Json = False,
) -> None:
    """Remove sessions by age or size; --older-than 0s removes all."""
    from edgekv.models.cache import kv_dir
    from edgekv.store.folder import remove_damaged

    if older_than is None and keep_gib is None:
        raise ConfigError(
            "prune needs to know what may go", hint="pass --older-than 7d, or --keep-gib 2"
        )
    unused_s = None if older_than is None else parse_age("older-than", older_than)
    kept = stored_sessions(app=app, model=model)
    chosen = to_prune(kept, unused_s=unused_s, keep_gib=keep_gib, now_s=time.time())
    if unused_s is not None and app is None and model is None:
        remove_damaged(kv_dir(), before_s=time.time() - unused_s)
    _remove(chosen, as_json=as_json)
    if not chosen and not as_json:
        say("Nothing to remove.")


def stored_sessions(*, app: str | None, model: str | None) -> list[Kept]:
    """What is kept, of all stores, the one used last first; what cannot be read is said."""
    from edgekv.models.cache import kv_dir
    from edgekv.store import Store

    kept = []
    named = None if model is None else _spelled(model)
    for view in Store.open_readonly(kv_dir()):
        if view.damage:
            say(f"warning: {one_line(view.damage)}")
        for session in view.sessions:
            if app in (None, session.app) and named in (None, _spelled(view.model)):
                kept.append(Kept(store=view, session=session))
    return sorted(kept, key=lambda one: one.session.used_s, reverse=True)


def _spelled(model: str) -> str:
    """A model's name in one of the ways to write it."""
    from edgekv.models.reference import parse_reference

    return str(parse_reference(model) or model)


def _remove(chosen: Sequence[Kept], *, as_json: bool) -> None:
    """Remove sessions and print which; those of a store that cannot be had stay, with an error."""
    from edgekv.store import Store

    removed: list[Kept] = []
    problem: StoreError | None = None
    for folder in dict.fromkeys(one.store.folder for one in chosen):
        here = [one for one in chosen if one.store.folder == folder]
        try:
            with closing(Store.reopen(here[0].store)) as store:
                for one in here:
                    found = store.find(one.session.app, one.session.name)
                    # Another program may have made another one of this name meanwhile.
                    if found is not None and found.created_s == one.session.created_s:
                        store.remove(found.key)
                        removed.append(one)
        except StoreError as error:
            problem = error
    if as_json:
        print(json.dumps({"removed": [one.facts() for one in removed]}), flush=True)
    else:
        lines = dict.fromkeys(f"removed {one}\n" for one in removed)
        print("".join(lines), end="", flush=True)
    if problem is not None:
        raise problem


# --- as text, and who is chosen ---


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


def choose(kept: Sequence[Kept], name: str) -> list[Kept]:
    """The session of this name; an error says that there is none, or which there are.

    One app can have several of that name of one model: each rank has its part of the KV, and other
    numbers of ranks have their own. Those in which something was said come first.
    """
    found = [one for one in kept if one.session.name == name]
    if not found:
        raise ConfigError(
            f"no session is called {name!r}", hint="edgekv sessions list shows their names"
        )
    which = dict.fromkeys(map(str, found))
    if len(which) > 1:
        raise ConfigError(
            f"{len(which)} sessions are called {name!r}: {'; '.join(which)}",
            hint="say which one with --app and --model",
        )
    return sorted(found, key=lambda one: one.session.conversation is None)


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
