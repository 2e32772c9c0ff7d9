"""Tests whose runtimes are on several ranks: `python rank_pytest.py N ARGUMENTS`, these of pytest.

    python tests/support/rank_pytest.py 2 tests/server/test_openai_client.py

Rank 0 runs pytest, in one process, and the others follow. For tests of one runtime at a time, whose
model can be cut.
"""

import os
import sys
import tempfile

import pytest

from edgekv.cli import chat
from edgekv.cli import main as cli_main
from edgekv.ranks.hosts import machines
from edgekv.ranks.launched import end_with_launcher, launched
from edgekv.ranks.launcher import launch
from edgekv.runtime.ranks import follow


def say(line):
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main():
    place = launched()
    if place is None:
        return launch(machines(local=int(sys.argv[1])), sys.argv, say)
    end_with_launcher(place)
    if place.rank:
        with tempfile.TemporaryDirectory() as folder:  # tests have folders of their own on rank 0
            os.environ["EDGEKV_KV_DIR"] = folder
            return follow(place)
    with pytest.MonkeyPatch.context() as patch:
        for command in (chat, cli_main):  # a command is as one that somebody else runs
            patch.setattr(command, "launched", lambda: None)
        return pytest.main(["-n", "0", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
