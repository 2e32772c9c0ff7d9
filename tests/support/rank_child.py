"""A rank of a test: `python rank_child.py WHAT`, launched by `ranks.start` or `edgekv launch`.

It says on stdout, line by line, what happens to it.
"""

import os
import sys
import threading
import time

import numpy as np

from edgekv.errors import EdgeKVError
from edgekv.ranks import control
from edgekv.ranks.launched import Launched, end_with_launcher, join, launched
from edgekv.ranks.liveness import Liveness
from edgekv.ranks.verdict import ENDING, IDLE, WAITING


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def told(rank: int, reason: str) -> None:
    say("failure", rank, reason)
    os._exit(3)


def stay(mine: Launched, liveness: Liveness) -> None:
    """Do nothing, as an idle engine, until a failure is told."""
    say("joined", mine.rank, os.getpid())
    liveness.note(1, WAITING if mine.rank else IDLE)
    threading.Event().wait(60)


def gather(mine: Launched, liveness: Liveness) -> None:
    """Compute one sum, and end."""
    import mlx.core as mx

    group = join(mine)
    liveness.note(0, WAITING)
    total = group.all_sum(mx.array([mine.rank + 1.0]))
    mx.eval(total)
    say("sum", total.item(), group.rank, group.size)
    liveness.note(1, WAITING if mine.rank else ENDING)
    group.exchange(np.zeros(1, np.int32))  # as the plan that tells the others to end
    if mine.rank == 0:
        time.sleep(0.2)  # the others go first
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


def main() -> int:
    what = sys.argv[1]
    mine = launched()
    assert mine is not None
    end_with_launcher(mine)
    if what == "old" and mine.rank == 1:
        control.version = lambda _: "0.31.0"  # type: ignore[assignment]
    liveness = Liveness(mine, told, stuck_s=float(os.environ.get("STUCK_S", "60")))
    try:
        liveness.start(float(os.environ.get("JOIN_S", "30")))
    except EdgeKVError as error:
        say("error", type(error).__name__, error)
        return 2
    globals().get(what, stay)(mine, liveness)
    return 0


if __name__ == "__main__":
    sys.exit(main())
