"""Small things that outlive a process and that nobody misses: a JSON object in a file."""

import contextlib
import json
import pathlib
from typing import Any

NUM_MAX = 1000  # entries; the newest stay


def recall(memory: pathlib.Path) -> dict[str, Any]:
    """What was remembered; a file that makes no sense holds nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(memory.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def remember(memory: pathlib.Path, known: dict[str, Any]) -> None:
    """Write all of it, or, where the disk refuses, nothing; the newest entries are last."""
    whole = memory.with_suffix(".new")
    with contextlib.suppress(OSError):
        memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole.write_text(json.dumps(dict(list(known.items())[-NUM_MAX:])))
        whole.replace(memory)
