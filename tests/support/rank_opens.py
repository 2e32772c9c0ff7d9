"""Runtimes that are opened on two ranks, one after the other: `python rank_opens.py FOLDER`.

FOLDER has models: "one" and "other", which can be cut in two, and "odd", which cannot. What rank 1
finds under the name "other" is "one", and under "gone" nothing. Rank 0 says what came of each, as
JSON, a line each.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

from tiny_models import random_ids
from tiny_runtime import answer, sampling

from edgekv.config import RuntimeConfig, StoreOptions
from edgekv.errors import EdgeKVError
from edgekv.models.hub import resolve
from edgekv.ranks.launched import launched
from edgekv.runtime import Runtime, ranks
from edgekv.runtime.ranks import follow

CONFIG = RuntimeConfig(pool_bytes=1 << 22, store=StoreOptions(disk_bytes=0))


def found_elsewhere(model):
    path = Path(model)
    names = {"other": "one", "gone": "nowhere"}
    return resolve(str(path.with_name(names.get(path.name, path.name))))


def tried(path):
    """What a model answers, or why it does not."""
    try:
        with Runtime.open(str(path), config=CONFIG) as runtime:
            with runtime.app().session() as session:
                said = answer(session, random_ids(20), sampling(4)).token_ids
            return {"said": said}
    except EdgeKVError as error:
        return {"error": f"{type(error).__name__}: {error}", "hint": error.hint}


def main():
    place, folder = launched(), Path(sys.argv[1])
    if place.rank:
        with patch.object(ranks, "resolve", found_elsewhere):
            return follow(place)
    found = {}
    with Runtime.open(str(folder / "one"), config=CONFIG):
        found["a second one"] = tried(folder / "one")
    found["after it"] = tried(folder / "one")
    for name in ("odd", "other", "gone"):
        found[name] = tried(folder / name)
    found["in the end"] = tried(folder / "one")
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
