"""A disk that was away for a while: `python rank_stale.py FOLDER MODEL`, on two ranks or alone.

Rank 1 finds under its session's name what it kept of another history, of as many tokens. Rank 0
says what was answered, as JSON: tokens, and how many were restored, turn by turn.
"""

import json
import shutil
import sys
from pathlib import Path

from tiny_models import random_ids
from tiny_runtime import answer, sampling

from edgekv.config import RuntimeConfig, StoreOptions
from edgekv.ranks.launched import launched
from edgekv.runtime import Runtime
from edgekv.runtime.ranks import follow


def opened(model, folder):
    store = StoreOptions(folder=folder, free_reserve_bytes=0)
    return Runtime.open(model, config=RuntimeConfig(pool_bytes=1 << 22, store=store))


def turn(model, folder, ids):
    """What a kept session answers, how much of it was restored, and rank 0's folder."""
    with opened(model, folder) as runtime:
        reply = answer(runtime.app().session("kept"), ids, sampling(8))
        return reply.token_ids, reply.stats.num_restored_tokens, runtime._store.folder.name


def bring_back(old, new, mine):
    """Give the ranks but 0 the stores that they had in another folder."""
    for store in old.iterdir():
        if store.is_dir() and store.name != mine:
            shutil.rmtree(new / store.name)
            shutil.copytree(store, new / store.name)


def main():
    place, (root, model) = launched(), (Path(sys.argv[1]), sys.argv[2])
    if place is not None and place.rank:
        return follow(place)
    old, new, ids = root / "old", root / "new", random_ids(200, seed=2)
    turn(model, old, random_ids(200, seed=1))
    said, _, mine = turn(model, new, ids)
    with opened(model, root / "between"):  # the others have closed what they had
        bring_back(old, new, mine)
    turns = []
    for more in (3, 4):
        ids += [*said, 5, 6, more]
        said, num_restored, _ = turn(model, new, ids)
        turns.append([said, num_restored])
    sys.stdout.write(json.dumps(turns) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
