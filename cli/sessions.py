"""`edgekv sessions`: what is kept of conversations, of all models, and how to get rid of it."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.options import Json
from edgekv.cli.progress import say
from edgekv.cli.render import one_line
from edgekv.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from edgekv.cli.session_text import Kept

sessions_app = typer.Typer(
    help="List, show and remove the conversations that are kept.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

_App = Annotated[str | None, typer.Option("--app", help="Only of this app.")]
_Model = Annotated[str | None, typer.Option("--model", "-m", help="Only of this model.")]


@sessions_app.command("list")
def list_sessions(app: _App = None, model: _Model = None, as_json: Json = False) -> None:
    """List sessions, the one used last first. Works beside a program that uses them."""
    from edgekv.cli.session_text import table, total_line

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
    from edgekv.cli.session_text import choose, description

    one = choose(stored_sessions(app=app, model=model), name)
    if as_json:
        said = None if one.messages is None else [asdict(message) for message in one.messages]
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
    from edgekv.cli.session_text import choose

    kept = stored_sessions(app=app, model=model)
    chosen = [choose(kept, name) for name in dict.fromkeys(names)]
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
    if older_than is None and keep_gib is None:
        raise ConfigError(
            "prune needs to know what may go", hint="pass --older-than 7d, or --keep-gib 2"
        )
    from edgekv.cli.session_text import parse_age, to_prune

    unused_s = None if older_than is None else parse_age("older-than", older_than)
    kept = stored_sessions(app=app, model=model)
    chosen = to_prune(kept, unused_s=unused_s, keep_gib=keep_gib, now_s=time.time())
    _remove(chosen, as_json=as_json)
    if not chosen and not as_json:
        say("Nothing to remove.")


def stored_sessions(*, app: str | None, model: str | None) -> "list[Kept]":
    """What is kept, of all stores, the one used last first; what cannot be read is said."""
    from edgekv.cli.session_text import Kept
    from edgekv.models.cache import kv_dir
    from edgekv.store import Store

    kept = []
    for view in Store.open_readonly(kv_dir()):
        if view.damage:
            say(f"warning: {one_line(view.damage)}")
        for session in view.sessions:
            if app in (None, session.app) and model in (None, view.model):
                kept.append(Kept(store=view, session=session))
    return sorted(kept, key=lambda one: one.session.used_s, reverse=True)


def _remove(chosen: "Sequence[Kept]", *, as_json: bool) -> None:
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
        print("".join(f"removed {one}\n" for one in removed), end="", flush=True)
    if problem is not None:
        raise problem
