"""`edgekv ps`: what goes on at the daemon."""

import json
import sys
import time
from typing import Annotated, Any

import typer

from edgekv.cli.options import Json
from edgekv.cli.render import one_line, size

WATCH_S = 1.0
PS_APP = "ps"  # who asks; whoever is at the socket is told of all apps
_HOME_AND_CLEAR = "\x1b[H\x1b[J"


def ps(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again each second, until Ctrl-C.")
    ] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Print the page's address, which lets one browser in.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the apps that use the daemon, their waiting times, and its memory and disk."""
    from edgekv.client.link import Link

    link = Link(None, None)
    try:
        if page:
            address = link.call("POST", "/edgekv/page", app=PS_APP)
            print(json.dumps(address) if as_json else address["address"])
            return
        while True:
            _show(link.call("GET", "/edgekv/status", app=PS_APP), as_json=as_json, watch=watch)
            if not watch:
                return
            time.sleep(WATCH_S)
    finally:
        link.close()


def _show(status: dict[str, Any], *, as_json: bool, watch: bool) -> None:
    if as_json:
        print(json.dumps(status), flush=True)
        return
    clear = _HOME_AND_CLEAR if watch and sys.stdout.isatty() else ""
    print(clear + "\n".join(table(status, time.time())), flush=True)


def table(status: dict[str, Any], now_s: float) -> list[str]:
    """A line about the daemon, and one for each app that asked lately, columns aligned."""
    parts = [one_line(status["model"]), f"up {_duration(now_s - status['started_s'])}"]
    if (pool := status.get("pool")) is not None:
        parts.append(f"pool {size(pool['used'])} of {size(pool['budget'])}")
    else:
        parts.append("not loaded")
    if disk := status.get("disk"):
        parts.append(f"disk {size(disk['used_bytes'])}")
    lines = [" · ".join(parts)]
    if not status["apps"]:
        return [*lines, "No app has asked yet."]
    rows = [("APP", "RUNNING", "RECENT", "TTFT P50", "P95", "TBT P50", "PROMPT", "CACHED")]
    for app in status["apps"]:
        rows.append(
            (
                one_line(app["name"]),
                str(app["num_running"]),
                str(app["num_recent"]),
                _milliseconds(app["ttft_p50_ms"]),
                _milliseconds(app["ttft_p95_ms"]),
                _milliseconds(app["tbt_p50_ms"]),
                str(app["num_prompt_tokens"]),
                str(app["num_cached_tokens"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *figures in rows:
        cells = [f"{text:>{width}}" for text, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *cells]))
    return lines


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value else "–"


def _duration(seconds: float) -> str:
    """The largest unit, in whole numbers."""
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds // length_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
