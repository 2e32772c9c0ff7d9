"""`edgekv apps`: which apps have keys, what they may have, and how they get and lose them."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekv.cli.options import Json
from edgekv.cli.progress import say
from edgekv.cli.render import one_line, size
from edgekv.config import GIB, check_float

if TYPE_CHECKING:
    from edgekv.server.keys import AppEntry

apps_app = typer.Typer(
    help="List the apps that have keys; add, change and revoke them.",
    rich_markup_mode=None,
    invoke_without_command=True,
)

_Name = Annotated[str, typer.Argument(help="The app's name.")]
_Weight = Annotated[
    float | None, typer.Option(help="Its share of the service, beside others of its class: 1.")
]
_Priority = Annotated[str | None, typer.Option(help="interactive, or background.")]
_MinKv = Annotated[
    float | None, typer.Option(metavar="GIB", help="KV memory that no other app takes from it.")
]
_Sessions = Annotated[
    int | None, typer.Option("--max-sessions", help="Open sessions; 0 leaves it to the runtime.")
]
_Rate = Annotated[int | None, typer.Option(help="Requests a minute; 0 does not limit them.")]


@apps_app.callback()
def list_apps(context: typer.Context, as_json: Json = False) -> None:
    """List the apps that have keys; add, change and revoke them."""
    from edgekv.server.keys import AppsFile

    if context.invoked_subcommand is not None:
        return
    entries = [*AppsFile().entries().values()]
    if as_json:
        print(json.dumps({"apps": [entry.facts() for entry in entries]}))
    elif entries:
        print("\n".join(table(entries)))
    else:
        say("No app has a key; edgekv apps add NAME makes one.")


@apps_app.command()
def add(
    name: _Name,
    weight: _Weight = None,
    priority: _Priority = None,
    min_kv: _MinKv = None,
    max_sessions: _Sessions = None,
    rate: _Rate = None,
    key_only: Annotated[
        bool, typer.Option("--key-only", help="It must show its key at the Unix socket, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make an app and its key, which is printed this once."""
    from edgekv.server.keys import AppsFile

    terms = _terms(weight, priority, min_kv, max_sessions, rate)
    key = AppsFile().add(name, key_only=key_only, **terms)
    if as_json:
        print(json.dumps({"name": name, "key": key}))
        return
    print(key, flush=True)
    say(f"This is the key of {one_line(name)}. It is kept nowhere: it is not shown again.")


@apps_app.command("set")
def change(
    name: _Name,
    weight: _Weight = None,
    priority: _Priority = None,
    min_kv: _MinKv = None,
    max_sessions: _Sessions = None,
    rate: _Rate = None,
    key_only: Annotated[
        bool | None,
        typer.Option("--key-only/--no-key-only", help="It must show its key at the socket, too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Change what an app may have, from its next request on; its key stays."""
    from edgekv.server.keys import AppsFile

    terms = _terms(weight, priority, min_kv, max_sessions, rate)
    if key_only is not None:
        terms["key_only"] = key_only
    entry = AppsFile().change(name, **terms)
    print(json.dumps(entry.facts()) if as_json else "\n".join(table([entry])))


@apps_app.command()
def revoke(name: _Name, as_json: Json = False) -> None:
    """Remove an app and its key; what was said in its sessions stays."""
    from edgekv.server.keys import AppsFile

    AppsFile().revoke(name)
    print(json.dumps({"revoked": name}) if as_json else f"revoked {one_line(name)}")


def _terms(
    weight: float | None,
    priority: str | None,
    min_kv: float | None,
    max_sessions: int | None,
    rate: int | None,
) -> dict[str, Any]:
    """Those that are given, under the names that the file has."""
    terms: dict[str, Any] = {}
    if weight is not None:
        terms["weight"] = weight
    if priority is not None:
        terms["priority"] = priority
    if min_kv is not None:
        terms["pinned_bytes"] = int(check_float("min-kv", min_kv, 0.0, float(1 << 20)) * GIB)
    if max_sessions is not None:
        terms["num_sessions_max"] = max_sessions or None
    if rate is not None:
        terms["rate_per_min"] = rate or None
    return terms


def table(entries: "Sequence[AppEntry]") -> list[str]:
    """A line each under a line of headings, columns aligned."""
    rows = [("NAME", "PRIORITY", "WEIGHT", "MIN KV", "SESSIONS", "A MINUTE", "KEY ONLY", "MADE")]
    for entry in entries:
        rows.append(
            (
                one_line(entry.name),
                entry.priority,
                f"{entry.weight:g}",
                size(entry.pinned_bytes) if entry.pinned_bytes else "-",
                str(entry.num_sessions_max or "-"),
                str(entry.rate_per_min or "-"),
                "yes" if entry.key_only else "no",
                time.strftime("%Y-%m-%d", time.localtime(entry.created_s)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{text:{side}{width}}"
            for text, side, width in zip(row, "<<>>>><<", widths, strict=True)
        ).rstrip()
        for row in rows
    ]
