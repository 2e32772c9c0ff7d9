"""Apps that have keys: a file in the user's state folder, changed by a command, read by a daemon.

Of a key only its SHA-256 is kept. No slow hash would add to that: a key is 256 random bits, which
nobody finds by trying, however little a try costs.
"""

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from edgekv.config import (
    PRIORITIES,
    Priority,
    check_choice,
    check_float,
    check_int,
    check_kind,
    user_path,
)
from edgekv.errors import AppsUnusable, ConfigError

STATE_ENV = "EDGEKV_STATE_DIR"
KEY_PREFIX = "ekv_"
NUM_APPS_MAX = 1000
NAME_LENGTH_MAX = 256  # as of the runtime's names
_FILE_BYTES_MAX = 4 << 20
_LOCK_WAIT_S = 10.0
_VERSION = 1

_log = logging.getLogger(__name__)


def state_dir() -> Path:
    """The folder of what edgekv keeps for the user beside models and KV; need not exist yet.

    Raises ConfigError: EDGEKV_STATE_DIR does not say where, and there is no home folder.
    """
    if named := os.environ.get(STATE_ENV):
        return user_path(named)
    with contextlib.suppress(RuntimeError):  # or "~/…", depending on platformdirs' version
        folder = Path(platformdirs.user_state_dir("edgekv"))
        if folder.is_absolute():
            return folder
    raise ConfigError(
        "this user has no home folder, where edgekv's state would be",
        hint=f"set {STATE_ENV} to a folder",
    )


def socket_path() -> Path:
    """Where the daemon listens if nobody says otherwise, and clients look for it."""
    return state_dir() / "edgekv.sock"


def new_key() -> str:
    """A key that nobody has."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def check_app_name(field: str, name: object) -> str:
    """Return what can be an app's name, in a header and on a terminal. Raises ConfigError."""
    is_name = isinstance(name, str) and name.isprintable() and name == name.strip()
    if not is_name or not 1 <= len(str(name)) <= NAME_LENGTH_MAX:
        raise ConfigError.of(field, name, f"1 to {NAME_LENGTH_MAX} characters that can be printed")
    return str(name)


@dataclass(frozen=True, kw_only=True)
class AppEntry:
    """An app that has a key.

    Attributes:
        name: Its name.
        key_sha256: Of its key, in hexadecimal digits.
        created_s: When the key was made, Unix time.
        weight, priority, pinned_bytes, num_sessions_max: What it may have; see `runtime.Terms`.
        rate_per_min: So many requests a minute; None does not limit them.
        key_only: Also at the Unix socket nobody is this app who does not show its key.
    """

    name: str
    key_sha256: str
    created_s: float
    weight: float = 1.0
    priority: Priority = "interactive"
    pinned_bytes: int = 0
    num_sessions_max: int | None = None
    rate_per_min: int | None = None
    key_only: bool = False

    def __post_init__(self) -> None:
        check_app_name("name", self.name)
        if not isinstance(self.key_sha256, str) or len(self.key_sha256) != 64:
            raise ConfigError.of("key_sha256", self.key_sha256, "64 hexadecimal digits")
        check_float("created_s", self.created_s, 0.0, 1e12)
        check_float("weight", self.weight, 0.001, 1000.0)
        check_choice("priority", self.priority, PRIORITIES)
        check_int("pinned_bytes", self.pinned_bytes, 0, 1 << 50)
        if self.num_sessions_max is not None:
            check_int("num_sessions_max", self.num_sessions_max, 1, 1 << 20)
        if self.rate_per_min is not None:
            check_int("rate_per_min", self.rate_per_min, 1, 1_000_000)
        check_kind("key_only", self.key_only, bool, allowed="True or False")

    @property
    def terms(self) -> dict[str, Any]:
        """What it may have, as `Runtime.app` takes it: 0 takes a limit away."""
        names = ("weight", "priority", "pinned_bytes", "num_sessions_max")
        return {name: getattr(self, name) or 0 for name in names}

    def facts(self) -> dict[str, Any]:
        """Plain values for people: all but what is kept of the key."""
        values = asdict(self)
        del values["key_sha256"]
        return values


class AppsFile:
    """The file of apps. Owned by one thread; other processes may change it at any time."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = state_dir() / "apps.json" if path is None else path
        self._entries: dict[str, AppEntry] = {}
        self._seen: object = None  # of which version of the file they are

    def entries(self) -> Mapping[str, AppEntry]:
        """Apps by name, as the file says now; a look at the file's times unless it was changed.

        Damage that comes while a daemon runs is told once in its log, and changes nothing: nobody
        should lose their apps to a slip of somebody's editor.

        Raises:
            AppsUnusable: The file could never be read.
        """
        version = _version(self.path)
        if version != self._seen:
            try:
                self._entries = _read(self.path)
            except AppsUnusable as error:
                if self._seen is None:
                    raise
                _log.warning("%s; the apps stay as they were", error)
            self._seen = version
        return self._entries

    def find(self, key: str) -> AppEntry | None:
        """The app of a key.

        Every app's hash is compared, each in constant time, whichever it is: how long this takes
        says how many apps there are and nothing about their keys.
        """
        found = None
        digest = key_hash(key)
        for entry in self.entries().values():
            if hmac.compare_digest(entry.key_sha256, digest):
                found = entry
        return found

    def add(self, name: str, **terms: Any) -> str:
        """Make an app; return its key, which is kept nowhere.

        Raises:
            ConfigError: There is one of this name, or a value is not allowed.
            AppsUnusable: The file cannot be read or written; it stays as it is.
        """
        key = new_key()
        entry = AppEntry(name=name, key_sha256=key_hash(key), created_s=time.time(), **terms)
        with self._changed() as entries:
            if name in entries:
                raise ConfigError(
                    f"there is an app {name!r} already",
                    hint="edgekv apps set changes it; revoke it first to get a new key",
                )
            if len(entries) >= NUM_APPS_MAX:
                raise ConfigError(
                    f"there are {len(entries)} apps, as many as there can be",
                    hint="edgekv apps revoke removes those that are not used",
                )
            entries[name] = entry
        return key

    def change(self, name: str, **terms: Any) -> AppEntry:
        """Change what an app may have. Raises as `add` does."""
        with self._changed() as entries:
            entries[name] = replace(_named(entries, name), **terms)
            return entries[name]

    def revoke(self, name: str) -> None:
        """Remove an app, and so its key. Raises as `add` does."""
        with self._changed() as entries:
            del entries[_named(entries, name).name]

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, AppEntry]]:
        """The apps of the file, to be changed; written at the end, while nobody else changes it."""
        lock = filelock.FileLock(f"{self.path}.lock", timeout=_LOCK_WAIT_S, mode=0o600)
        try:
            make_private(self.path.parent)
            with lock:
                entries = _read(self.path)
                yield entries
                _write(self.path, entries)
        except filelock.Timeout:
            raise AppsUnusable(
                f"another process has held {lock.lock_file} for {_LOCK_WAIT_S:.0f} s",
                hint="end that process",
            ) from None
        except OSError as error:
            raise AppsUnusable(
                f"{self.path} cannot be changed: {error.strerror}",
                hint="give this user access to its folder, and some space",
            ) from None


def make_private(folder: Path) -> None:
    """Make the state folder, or see that nobody else looks into it. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def _named(entries: Mapping[str, AppEntry], name: str) -> AppEntry:
    if name not in entries:
        raise ConfigError(f"no app is called {name!r}", hint="edgekv apps shows their names")
    return entries[name]


def _version(path: Path) -> object:
    """Differs from what it was if the file was written, replaced or removed since."""
    try:
        status = path.lstat()
    except OSError:
        return "none"
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> dict[str, AppEntry]:
    """Apps by name; none if there is no file. Raises AppsUnusable."""
    try:
        data = _bytes(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise AppsUnusable(
            f"{path} cannot be read: {error.strerror}", hint="it must be a file of this user's own"
        ) from None
    try:
        return _parsed(json.loads(data))
    except (ValueError, TypeError, KeyError, RecursionError, ConfigError) as error:
        raise AppsUnusable(
            f"{path} is damaged: {error}",
            hint="repair it; or move it away, which revokes all keys",
        ) from None


def _bytes(path: Path) -> bytes:
    """What the file holds; others are kept out of it first. Raises OSError."""
    # A pipe in its place must not hang the daemon, and a link could lead to another user's file.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(0, "it is no file, or another user's")
        if status.st_size > _FILE_BYTES_MAX:
            raise OSError(0, f"it has {status.st_size} bytes")
        if status.st_mode & 0o077:
            _log.warning("%s was open to other users (mode %o)", path, status.st_mode & 0o777)
            os.fchmod(fd, 0o600)
        return file.read()


def _parsed(values: Any) -> dict[str, AppEntry]:
    """Raises ValueError, TypeError, KeyError or ConfigError: this is not what was written."""
    if values["version"] != _VERSION:
        raise ValueError(f"it is of version {values['version']}, and {_VERSION} is known")
    entries = [AppEntry(**fields) for fields in values["apps"]]
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) < len(entries) or len({entry.key_sha256 for entry in entries}) < len(entries):
        raise ValueError("two apps have one name or one key")
    return by_name


def _write(path: Path, entries: Mapping[str, AppEntry]) -> None:
    """Replace the file as a whole. Raises OSError; the old file is there then."""
    apps = [asdict(entry) for entry in entries.values()]
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # 0600
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump({"version": _VERSION, "apps": apps}, file, indent=1)
            file.flush()
            os.fsync(fd)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
