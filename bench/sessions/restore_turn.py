"""One turn of `bench restore`; run as a module, the turns of a process that starts anew.

`python -m edgekv.bench.sessions.restore_turn` reads an order as JSON from stdin (see `main`) and
writes what `ask` returns for each of its jobs to stdout.
"""

import json
import pathlib
import sys
from typing import Any

from edgekv.bench.sessions.turns import ttft_ms
from edgekv.config import RuntimeConfig, SamplingParams, StoreOptions
from edgekv.runtime import Runtime, Session


def runtime_config(folder: pathlib.Path, pool_bytes: int, disk_bytes: int) -> RuntimeConfig:
    """Both processes' configuration."""
    store = StoreOptions(folder=folder, disk_bytes=disk_bytes)
    return RuntimeConfig(pool_bytes=pool_bytes, store=store)


def ask(session: Session, token_ids: list[int], output_tokens: int) -> dict[str, Any]:
    """Continue token ids to the end.

    Returns:
        `ttft_ms`, `restore_ms`, `num_restored_tokens`, and the answer's `token_ids`.
    """
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    with session.submit_ids(token_ids, sampling) as stream:
        for _ in stream:
            pass
    assert stream.reply is not None
    stats = stream.reply.stats
    return {
        "ttft_ms": ttft_ms(stats),
        "restore_ms": stats.restore_ms,
        "num_restored_tokens": stats.num_restored_tokens,
        "token_ids": list(stream.reply.token_ids),
    }


def main() -> None:
    """Carry out an order: `model`, `folder`, `pool_bytes`, `disk_bytes`, and `jobs`.

    A job is a session's `name` (its app has the same), `token_ids` and `output_tokens`.
    """
    order = json.load(sys.stdin)
    config = runtime_config(pathlib.Path(order["folder"]), order["pool_bytes"], order["disk_bytes"])
    with Runtime.open(order["model"], config=config) as runtime:
        turns = []
        for job in order["jobs"]:
            session = runtime.app(job["name"]).session(job["name"])
            turns.append(ask(session, job["token_ids"], job["output_tokens"]))
            session.suspend()
    json.dump(turns, sys.stdout)


if __name__ == "__main__":
    main()
