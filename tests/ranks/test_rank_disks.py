"""What a rank has on its disk is of the tokens that rank 0 means, or is not used."""

import json
import os
import subprocess
import sys

import pytest
import rank_stale
from rank_world import places
from tiny_models import tiny_config, write_folder

from edgekv.ranks.launched import VARIABLE

pytestmark = pytest.mark.slow


def turns_on(ranks, folder, model):
    """See `rank_stale`."""
    started = [
        subprocess.Popen(
            [sys.executable, rank_stale.__file__, str(folder), str(model)],
            env={**os.environ, **({VARIABLE: rank.variable()} if rank else {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in started]
    finally:
        for rank in started:
            rank.kill()
            rank.wait()
    assert not any(rank.returncode for rank in started)
    return json.loads(said[0])


def test_other_tokens_under_a_sessions_name_are_a_miss(tmp_path):
    model = write_folder(tmp_path / "model", tiny_config("llama"))
    alone = turns_on([None], tmp_path / "alone", model)
    together = turns_on(places(), tmp_path / "together", model)
    assert [said for said, _ in together] == [said for said, _ in alone]
    assert [num_restored > 0 for _, num_restored in alone] == [True, True]
    assert [num_restored > 0 for _, num_restored in together] == [False, True]
