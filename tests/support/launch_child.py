"""A launcher of test ranks: `python launch_child.py HOSTS WHAT`; HOSTS is a number or addresses."""

import sys
from pathlib import Path

from edgekv.ranks.hosts import machines
from edgekv.ranks.launcher import launch

CHILD = Path(__file__).parent / "rank_child.py"


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> int:
    where, *what = sys.argv[1:]
    these = machines(local=int(where)) if where.isdecimal() else machines(hosts=where)
    return launch(these, [str(CHILD), *what], say)


if __name__ == "__main__":
    sys.exit(main())
