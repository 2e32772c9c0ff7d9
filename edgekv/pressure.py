"""How short of memory the system is, and how much of the KV pool may be used meanwhile.

macOS says it in levels (`kern.memorystatus_vm_pressure_level`: 1 normal, 2 warning, 4 critical).
Linux says for how much of the time tasks waited for memory (PSI, `/proc/pressure/memory`; the
kernel's Documentation/accounting/psi.rst). A system that says neither has no monitor.

The soft budget goes down at once, because others wait for the memory, and up a step at a time
after a calm while, because what was given back too early is written to SSD again.
"""

import contextlib
import ctypes
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from edgekv.clock import Clock, MonotonicClock
from edgekv.errors import EdgeKVError

POLL_S = 1.0
CALM_MS = 20_000.0  # before each step up; PSI's figure is of the last ten seconds
STALL_PERCENT = 10.0  # 100 ms of every second

PSI_PATH = Path("/proc/pressure/memory")
_PSI_BYTES_MAX = 4096
_PSI_LINE = re.compile(r"^(some|full) (?:.* )?avg10=(\d{1,3}(?:\.\d+)?)(?: |$)", re.MULTILINE)
_SYSCTL = b"kern.memorystatus_vm_pressure_level"


class PressureLevel(IntEnum):
    """How short of memory the system is."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2


_LEVELS = {1: PressureLevel.NORMAL, 2: PressureLevel.WARNING, 4: PressureLevel.CRITICAL}  # macOS
FRACTIONS = {PressureLevel.NORMAL: 1.0, PressureLevel.WARNING: 0.6, PressureLevel.CRITICAL: 0.3}

Reader = Callable[[], PressureLevel | None]  # None: the system does not say


@dataclass(frozen=True, kw_only=True)
class SoftBudget:
    """What may be used of the pool, and since when the pressure has been less than that."""

    level: PressureLevel = PressureLevel.NORMAL
    calm_since_ms: float | None = None  # since when readings are below `level`

    @property
    def fraction(self) -> float:
        """Of the pool's bytes."""
        return FRACTIONS[self.level]

    def after(self, reading: PressureLevel | None, now_ms: float) -> "SoftBudget":
        """The budget once the system was asked; what it does not say counts as calm."""
        seen = PressureLevel.NORMAL if reading is None else reading
        if seen > self.level:
            return SoftBudget(level=seen)
        if seen == self.level:
            return replace(self, calm_since_ms=None)
        if self.calm_since_ms is None:
            return replace(self, calm_since_ms=now_ms)
        if now_ms - self.calm_since_ms < CALM_MS:
            return self
        return SoftBudget(level=PressureLevel(self.level - 1), calm_since_ms=now_ms)


def parse_psi(text: str) -> PressureLevel | None:
    """The level that `/proc/pressure/memory` amounts to; None if this is not its format.

    Warning: some task waited for memory for a tenth of the last ten seconds. Critical: all did.
    """
    stalls = {kind: float(percent) for kind, percent in _PSI_LINE.findall(text)}
    if "some" not in stalls:
        return None
    if stalls.get("full", 0.0) >= STALL_PERCENT:
        return PressureLevel.CRITICAL
    return PressureLevel.WARNING if stalls["some"] >= STALL_PERCENT else PressureLevel.NORMAL


def read_psi(path: Path = PSI_PATH) -> PressureLevel | None:
    """Ask Linux; None where PSI is not there or switched off."""
    try:
        with path.open("rb") as file:
            return parse_psi(file.read(_PSI_BYTES_MAX).decode("ascii", "replace"))
    except OSError:
        return None


def read_sysctl(library: ctypes.CDLL | None = None) -> PressureLevel | None:
    """Ask macOS; None where the C library has no such sysctl, or it says something unknown."""
    ask = getattr(library or ctypes.CDLL(None), "sysctlbyname", None)
    if ask is None:
        return None
    value = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    failed = ask(_SYSCTL, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    if failed or size.value != ctypes.sizeof(value):
        return None
    return _LEVELS.get(value.value)


def system_reader(readers: Sequence[Reader] = (read_sysctl, read_psi)) -> Reader | None:
    """The first reader that this system answers; None if none is."""
    return next((reader for reader in readers if reader() is not None), None)


class PressureMonitor:
    """Asks the system once a second and tells its owner when the soft budget changes.

    Owned by whoever starts it. `on_change` runs on the monitor's thread, must not block, and ends
    the monitor by raising an EdgeKVError: then nobody is left to tell. It takes the new fraction of
    the pool that may be used; 1.0 is where it begins.
    """

    def __init__(
        self, on_change: Callable[[float], None], reader: Reader, clock: Clock | None = None
    ) -> None:
        self._on_change = on_change
        self._reader = reader
        self._clock = clock or MonotonicClock()
        self._budget = SoftBudget()  # of the thread, or of who calls `poll` instead of it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgekv-pressure", daemon=True)

    @classmethod
    def start(cls, on_change: Callable[[float], None]) -> "PressureMonitor | None":
        """A monitor that runs, or None on a system that does not say how its memory is."""
        reader = system_reader()
        if reader is None:
            return None
        monitor = cls(on_change, reader)
        monitor._thread.start()
        return monitor

    def poll(self) -> None:
        """Ask once."""
        budget = self._budget.after(self._reader(), self._clock.now_ms())
        changed = budget.fraction != self._budget.fraction
        self._budget = budget
        if changed:
            self._on_change(budget.fraction)

    def _run(self) -> None:
        with contextlib.suppress(EdgeKVError):
            while not self._stop.wait(POLL_S):
                self.poll()

    def close(self) -> None:
        """Stop; `on_change` is not called any more once this returns."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
