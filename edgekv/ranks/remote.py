"""How a rank begins where the launcher is not: `python -m edgekv.ranks.remote`.

One line on stdin says what to run and with which variables, the launch's token among them: what
is on a command line every user of that machine can read. Then stdin is the rank's line to its
launcher, whatever is between the two.
"""

import json
import os
import sys

_LINE_BYTES_MAX = 1 << 20


def read_line(fd: int) -> bytes:
    """One line, and nothing of what follows it."""
    line = b""
    while len(line) < _LINE_BYTES_MAX and (byte := os.read(fd, 1)) != b"\n":
        if not byte:
            raise SystemExit("the launcher has gone before it said what to run")
        line += byte
    return line


def main() -> None:
    """Become the rank."""
    order = json.loads(read_line(sys.stdin.fileno()))
    os.execve(sys.executable, [sys.executable, *order["argv"]], {**os.environ, **order["environ"]})


if __name__ == "__main__":
    main()
