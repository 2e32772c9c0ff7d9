"""Conversations of real clients as they sent them, all text replaced: `tests/server/recorded/`.

    {"client": "…", "requests": [{"path": "…", "headers": {…}, "body": {…}}, …]}

A value of a body that an earlier request has at the same place stands there alone, later
`{"$same": 0}` by that request's number. Texts are other words, the same for the same text, and long
ones are shorter; what says how a request is built is as it was: roles, types, names, schemas.
What the model said is what `answer` says, in the recording and in tests.

    python tests/support/recorded.py LOG CLIENT >tests/server/recorded/NAME.json

makes one of a log of requests, one `{"line": "POST … HTTP/1.1", "headers": {…}, "body": {…}}` a
line.
"""

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekv.chat.values import Completion

FOLDER = Path(__file__).parent.parent / "server" / "recorded"
SAME = "$same"

# Calls that are harmless; each client has a tool of one of these names.
_CALLS = {
    "Bash": {"command": "echo hi", "description": "Say hi"},
    "bash": {"command": "echo hi", "description": "Say hi"},
    "exec_command": {"cmd": "echo hi"},
    "shell_command": {"command": "echo hi"},
    "shell": {"command": ["echo", "hi"]},
}
FIRST, CALLED, LAST = "Hi there, all is well.", "The command said hi.", "Goodbye to you."
_TITLE = "A short greeting"
_OURS = {FIRST, CALLED, LAST, _TITLE, "Say hi.", "Now say bye.", "hi", "echo hi", "Say hi"}


def answer(asked: Completion) -> str:
    """What the model says: it calls a tool, says what came of it, and goodbye."""
    if not asked.tools:
        return _TITLE
    roles = [m.role for m in asked.messages if m.role not in ("system", "developer")]
    if roles[-1] == "tool":
        return CALLED
    if "assistant" in roles:
        return LAST
    names = {tool.name for tool in asked.tools}
    for name, arguments in _CALLS.items():
        if name in names:
            # Neither as templates write calls nor as clients send them back.
            call = json.dumps({"arguments": arguments, "name": name}, separators=(" ,", ":"))
            return f"<tool_call>\n{call}\n</tool_call>"
    return FIRST


def load(path: Path) -> dict[str, Any]:
    """A recording, whole again."""
    recording: dict[str, Any] = json.loads(path.read_text())
    bodies: list[Any] = []
    for request in recording["requests"]:
        request["body"] = _whole(request["body"], bodies)
        bodies.append(request["body"])
    return recording


def _whole(value: Any, earlier: list[Any]) -> Any:
    match value:
        case {"$same": int(index)} if len(value) == 1:
            return earlier[index]
        case dict():
            return {k: _whole(v, _at(earlier, k)) for k, v in value.items()}
        case list():
            return [_whole(v, _at(earlier, i)) for i, v in enumerate(value)]
    return value


def _at(values: list[Any], key: Any) -> list[Any]:
    """What they have at a key or an index; None for those that have nothing there."""
    found: list[Any] = []
    for value in values:
        is_there = key in value if isinstance(value, dict) else isinstance(value, list)
        is_there = is_there and (not isinstance(value, list) or key < len(value))
        found.append(value[key] if is_there else None)
    return found


# --- making one ---

_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "what", "user", "asks")
_HEADERS = re.compile(r"(thread|session|x-session|x-interaction)-id|x-claude-code-.*|x-initiator")
_KEPT = {
    "call_id", "enum", "format", "id", "model", "name", "namespace", "pattern", "phase", "required",
    "role", "status", "syntax", "tool_call_id", "tool_choice", "tool_use_id", "type", "verbosity",
    "effort", "include", "$schema", "default", "const", "summary", "context", "ttl", "keep",
}  # fmt: skip
_BILLING = "x-anthropic-billing-header:"


def recorded(requests: Iterator[dict[str, Any]], client: str) -> dict[str, Any]:
    """A recording of the conversation."""
    kept, bodies = [], []
    for request in requests:
        method, path, _ = request["line"].split()
        if method != "POST":
            continue
        body = _replaced(request["body"], "")
        headers = {k: _other(v) for k, v in request["headers"].items() if _HEADERS.fullmatch(k)}
        kept.append({"path": path, "headers": headers, "body": _shared(body, bodies)})
        bodies.append(body)
    return {"client": client, "requests": kept}


def _shared(value: Any, earlier: list[Any]) -> Any:
    long = len(json.dumps(value)) > 40
    for index, other in enumerate(earlier):
        if long and value == other:
            return {SAME: index}
    match value:
        case dict():
            return {k: _shared(v, _at(earlier, k)) for k, v in value.items()}
        case list():
            return [_shared(v, _at(earlier, i)) for i, v in enumerate(value)]
    return value


def _replaced(value: Any, key: str) -> Any:
    match value:
        case str():
            return value if key in _KEPT and re.fullmatch(r"[^\s/]{1,64}", value) else _other(value)
        case dict():
            return {_digest(k) if "/" in k else k: _replaced(v, k) for k, v in value.items()}
        case list():
            return [_replaced(v, key) for v in value]
    return value


def _other(text: str) -> str:
    """Other words for a text; white space around it stays."""
    core = text.strip()
    if core in _OURS or not core:
        return text
    if core.startswith(_BILLING):
        head, newline, rest = core.partition("\n")
        return f"{_BILLING} {_digest(head)};{newline}{_other(rest)}"
    if core[0] == "{":
        try:
            value = json.loads(core)
        except ValueError:
            return _soup(core)
        other = _replaced(value, "")
        return text if other == value else json.dumps(other, separators=(",", ":"))
    lead, _, trail = text.partition(core)
    return lead + (_soup(core) if re.search(r"\s", core) else _digest(core)) + trail


def _soup(text: str) -> str:
    size = len(text) if len(text) <= 120 else 120 + (len(text) - 120) // 3
    pick = random.Random(_digest(text))
    words = pick.choice(_WORDS)
    while len(words) < size:
        words += (" " if pick.random() < 0.95 else "\n") + pick.choice(_WORDS)
    return words


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[: max(8, len(text))]


if __name__ == "__main__":
    lines = map(json.loads, Path(sys.argv[1]).read_text().splitlines())
    whole = recorded((line for line in lines if "line" in line), sys.argv[2])
    json.dump(whole, sys.stdout, ensure_ascii=False, separators=(",", ":"))
