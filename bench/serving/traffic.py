"""What apps send: how often, how long, and whether one after the other. Pure.

An app sends *requests* that have nothing to do with each other, or has a number of users with
*conversations* as in `sessions.conversations`, each coming back for its next turn. Its share is of
all requests a second. Users think for as long as that leaves: with twice as many users at the same
rate each comes back half as often.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from edgekv.config import PRIORITIES, Priority, check_choice, check_float, check_int
from edgekv.errors import ConfigError

Kind = Literal["requests", "conversations"]
TOKENS_MAX = 1 << 20
APPS_MAX = 64
_UNIT_SHORT = (1 / 16, 1 / 8)  # prompts of who asks little, in units
_UNIT_LONG = (3 / 4, 5 / 4)  # and of who asks much
_FILE_BYTES_MAX = 1 << 20
_OF_KIND = {"prompt_tokens": "requests", "output_tokens": "requests"} | dict.fromkeys(
    ("users", "turns", "session_tokens"), "conversations"
)


@dataclass(frozen=True, kw_only=True)
class AppTraffic:
    """What one app sends."""

    name: str
    key: str | None = None  # what it is known by at a target that was started by somebody else
    priority: Priority = "interactive"  # its class
    kind: Kind = "requests"
    share: float = 1.0  # of all requests a second, to the sum of shares
    # Of requests: lengths are drawn evenly between these two, both included.
    prompt_tokens: tuple[int, int] = (64, 128)
    output_tokens: tuple[int, int] = (16, 16)
    # Of conversations: how many are open at a time, mean turns, and mean tokens at the end.
    users: int = 12
    turns: float = 5.5
    session_tokens: int = 1024

    def __post_init__(self) -> None:
        for field, value in (("name", self.name), ("key", "-" if self.key is None else self.key)):
            if not isinstance(value, str) or not value.isascii() or not value.isprintable():
                raise ConfigError.of(self._at(field), value, "printable ASCII")
            if not value or value != value.strip():
                raise ConfigError.of(self._at(field), value, "a word")
        check_choice(self._at("class"), self.priority, PRIORITIES)
        check_choice(self._at("kind"), self.kind, get_args(Kind))
        check_float(self._at("share"), self.share, 1e-6, 1e6)
        for field in ("prompt_tokens", "output_tokens"):
            low, high = getattr(self, field)
            check_int(self._at(field), low, 1, TOKENS_MAX)
            check_int(self._at(field), high, low, TOKENS_MAX)
        check_int(self._at("users"), self.users, 1, 4096)
        check_float(self._at("turns"), self.turns, 1.0, 1000.0)
        check_int(self._at("session_tokens"), self.session_tokens, 16, TOKENS_MAX)

    def _at(self, field: str) -> str:
        return f"{self.name}.{field}"

    @property
    def demand(self) -> tuple[object, ...]:
        """What makes it this app's traffic and not another's, but for the app itself."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.name not in ("name", "key"))


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Apps that send at the same time."""

    name: str
    apps: tuple[AppTraffic, ...]

    def __post_init__(self) -> None:
        check_int("number of apps", len(self.apps), 1, APPS_MAX)
        names = [app.name for app in self.apps]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError.of("name", name, "another one for each app")

    def rate_of(self, app: AppTraffic, rate: float) -> float:
        """An app's requests a second, of those of all."""
        return rate * app.share / sum(each.share for each in self.apps)


def usual_scenarios(unit_tokens: int) -> list[Scenario]:
    """The workloads of `bench fairness` and `bench switch`, over sockets.

    prefill: short requests beside long prompts of another app, which is in the background. turns:
    conversations of many users. Lengths are in units of a long prompt.
    """
    short = AppTraffic(
        name="interactive",
        share=4.0,
        prompt_tokens=_units(unit_tokens, _UNIT_SHORT),
        output_tokens=(12, 20),
    )
    long = AppTraffic(
        name="background",
        priority="background",
        prompt_tokens=_units(unit_tokens, _UNIT_LONG),
        output_tokens=(4, 12),
    )
    chat = AppTraffic(name="chat", kind="conversations", session_tokens=max(128, unit_tokens))
    return [Scenario(name="prefill", apps=(short, long)), Scenario(name="turns", apps=(chat,))]


def _units(unit_tokens: int, span: tuple[float, float]) -> tuple[int, int]:
    low, high = (max(1, round(unit_tokens * part)) for part in span)
    return low, high


def read_scenario(path: Path) -> Scenario:
    """Apps from a TOML or JSON file: a list of tables, or of objects, called `apps`.

    Each has a name, and may have key, class, kind, share, and what its kind asks for: prompt_tokens
    and output_tokens (a number, or the two between which they are), or users, turns and
    session_tokens.

    Raises:
        ConfigError: The file cannot be read, or a field is not what it must be.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
        text = data.decode("utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"apps {path}: {reason}", hint="it must be TOML, or .json") from error
    if len(data) > _FILE_BYTES_MAX:
        raise ConfigError.of("apps", str(path), f"a file of at most {_FILE_BYTES_MAX} bytes")
    apps = values.get("apps") if isinstance(values, Mapping) else values
    if not isinstance(apps, list) or not all(isinstance(app, Mapping) for app in apps):
        raise ConfigError.of("apps", str(path), "a file with a list of apps")
    return Scenario(name=path.stem, apps=tuple(map(_read_app, apps)))


def _read_app(values: Mapping[str, Any]) -> AppTraffic:
    name, kind = values.get("name"), values.get("kind", "requests")
    if not isinstance(name, str):
        raise ConfigError.of("an app's name", name, "a word")
    known = {field.name for field in fields(AppTraffic)} - {"priority"} | {"class"}
    for field, value in values.items():
        if field not in known or _OF_KIND.get(field, kind) != kind:
            allowed = sorted(n for n in known if _OF_KIND.get(n, kind) == kind)
            what = f"{name}.{field}" if kind in get_args(Kind) else f"{name}.kind"
            hint = f"an app with {kind} has {', '.join(allowed)}"
            raise ConfigError(f"{what} is {value!r}, which means nothing", hint=hint)
    read = {"priority" if field == "class" else field: v for field, v in values.items()}
    for field in ("prompt_tokens", "output_tokens"):
        if field in read:
            read[field] = _span(f"{name}.{field}", read[field])
    return AppTraffic(**read)


def _span(field: str, value: object) -> tuple[int, int]:
    values = value if isinstance(value, list) else [value, value]
    if len(values) != 2:
        raise ConfigError.of(field, value, "a number, or the two between which it is")
    low = check_int(field, values[0], 1, TOKENS_MAX)
    return low, check_int(field, values[1], low, TOKENS_MAX)
