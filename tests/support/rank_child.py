"""A rank of a test: `python rank_child.py WHAT`, launched by `ranks.start` or `edgekv launch`.

It says on stdout, line by line, what happens to it.
"""

import os
import signal
import sys
import threading
import time

from edgekv.errors import EdgeKVError
from edgekv.ranks import control
from edgekv.ranks import launched as ranks_launched
from edgekv.ranks import liveness as ranks_liveness
from edgekv.ranks.launched import (
    JOINED,
    VARIABLE,
    Launched,
    end_with_launcher,
    join,
    launched,
)
from edgekv.ranks.liveness import Liveness
from edgekv.ranks.verdict import IDLE, WAITING

CAME: list[int] = []  # signals
ranks_launched.LEFT_ALONE_S = ranks_liveness.LEFT_ALONE_S = 2.0  # tests are impatient


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def told(rank: int, reason: str) -> None:
    say("failure", rank, reason)
    os._exit(3)


def stay(mine: Launched, liveness: Liveness) -> None:
    """Do nothing, as an idle engine, until a failure is told."""
    liveness.note(1, WAITING if mine.rank else IDLE)
    say("joined", mine.rank, os.getpid())
    threading.Event().wait(60)


def gather(mine: Launched, liveness: Liveness) -> None:
    """Compute one sum, and end."""
    import mlx.core as mx

    group = join(mine)
    liveness.note(0, WAITING)
    total = group.all_sum(mx.array([mine.rank + 1.0]))
    mx.eval(total)
    say("sum", total.item(), group.rank, group.size)
    if mine.rank == 0:
        time.sleep(0.5)  # the others go first, and have not failed
    liveness.close()
    say("closed")


def overstay(mine: Launched, liveness: Liveness) -> None:
    """Rank 0 ends; the others do not, as those that it cannot tell."""
    if mine.rank == 0:
        liveness.close()
    else:
        stay(mine, liveness)


def stick(mine: Launched, liveness: Liveness) -> None:
    """The last rank is in a disk's hands, and the others wait for it."""
    liveness.note(5, "restoring" if mine.rank == mine.size - 1 else WAITING)
    threading.Event().wait(60)


def give_up(mine: Launched, liveness: Liveness) -> None:
    if mine.rank == 1:
        liveness.fail("a file is damaged")
    else:
        stay(mine, liveness)


# --- under the launcher ---


def echo(mine: Launched, liveness: Liveness) -> None:
    """Rank 0 repeats its stdin; the others have something to say."""
    liveness.note(1, WAITING if mine.rank else IDLE)
    if mine.rank:
        say("a figure")
        sys.stderr.write(f"stdin is a terminal: {sys.stdin.isatty()}\n")
        sys.stderr.flush()
        liveness.note(2, WAITING)
        threading.Event().wait(60)
    for line in sys.stdin:
        say("echo", line.strip())
        if line.startswith("exit"):
            liveness.close()
            sys.exit(int(line.split()[1]))
    liveness.close()


def interrupted(mine: Launched, liveness: Liveness) -> None:
    """Count what comes from outside, on every rank."""

    def take(number: int, _frame: object) -> None:
        if number != signal.SIGINT:
            CAME.append(number)
        sys.stderr.write(f"took {signal.Signals(number).name}\n")
        sys.stderr.flush()
        if number != signal.SIGINT:
            liveness.close()
            sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, take)
    stay(mine, liveness)
    while True:
        time.sleep(1)


def die_early(mine: Launched) -> None:
    if mine.rank == 1:
        sys.exit("no such model")


def linger(mine: Launched) -> None:
    """Rank 1 ends by nothing but SIGKILL; rank 0 ends at once, with a status of its own."""
    if mine.rank == 0:
        time.sleep(1)
        sys.exit(5)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("lingers", os.getpid())
    while True:
        time.sleep(1)


EARLY = {"die_early": die_early, "linger": linger}


def main() -> int:
    what = sys.argv[1]
    mine = launched()
    assert mine is not None
    assert VARIABLE not in os.environ
    end_with_launcher(mine, CAME)
    EARLY.get(what, lambda _: None)(mine)
    if what == "old" and mine.rank == 1:
        control.version = lambda _: "0.31.0"  # type: ignore[assignment]
    liveness = Liveness(mine, told, stuck_s=float(os.environ.get("STUCK_S", "60")))
    try:
        liveness.start(float(os.environ.get("JOIN_S", "30")))
    except EdgeKVError as error:
        say("error", type(error).__name__, error)
        return 2
    if mine.rank == 0 and mine.line is not None:
        os.write(mine.line, JOINED)  # as `join` does
    globals().get(what, stay)(mine, liveness)
    return 0


if __name__ == "__main__":
    sys.exit(main())
