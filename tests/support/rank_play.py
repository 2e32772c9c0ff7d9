"""Sessions of several models, played on one process or on several ranks: the same answers.

`python rank_play.py FOLDER_FOR_KV MODEL...` prints as JSON, on one line, what was answered; a model
is a folder, or a folder, a predictor and perhaps its auxiliary, with commas between. Started as a
rank other than the first, it follows.
"""

import contextlib
import json
import pathlib
import random
import sys
import unittest.mock

import numpy as np
from tiny_models import random_ids
from tiny_runtime import answer, sampling

from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions
from edgekv.device import profile
from edgekv.engine.predicted import PredictedPrefill
from edgekv.engine.writes import Staging
from edgekv.kv.layout import BLOCK_TOKENS
from edgekv.models.kv_layout import kv_layout
from edgekv.models.open_model import open_checkpoint
from edgekv.models.parts import Part
from edgekv.models.weights import parse_checkpoint
from edgekv.ranks.launched import launched
from edgekv.runtime import Runtime
from edgekv.runtime.loading import STAGING_SHARE
from edgekv.runtime.ranks import follow

NUM_TOKENS = 8
CONSTANTS = {  # so that little text is enough to roll, to keep snapshots, to be preempted
    "edgekv.engine.request.ADMISSION_RESERVE_TOKENS": 1,
    "edgekv.kv.layout.SNAPSHOT_TOKENS_MIN": 32,
    "edgekv.kv.layout.SNAPSHOT_TOKENS_MAX": 32,
    "edgekv.kv.layout.WINDOW_GROUP_TOKENS": 64,
    "edgekv.kv.layout.WINDOW_BACK_TOKENS": 32,
}


def play(what, folder, num_moves=20):
    """What sessions of a model are answered that are asked, preempted and closed at random."""
    model, *predicted = what.split(",")
    store = StoreOptions(folder=folder, free_reserve_bytes=0)
    options = dict(zip(("predictor", "aux"), predicted, strict=False))
    config = RuntimeConfig(
        pool_bytes=capacity_for(model, 9 if predicted else 5),
        tbt_target_ms=5.0,
        store=store,
        prediction=PredictionOptions(**options, window=8, look=0.2),
    )
    mode = "predict" if predicted else "exact"
    dice, said, num_predicted = random.Random(0), {}, 0
    with Runtime.open(model, config=config) as runtime:
        apps = [runtime.app("one"), runtime.app("two")]
        sessions, streams = {}, {}
        for _ in range(num_moves):
            index = dice.randrange(8)
            if index in streams:
                stream = streams.pop(index)
                if dice.random() < 0.2:
                    stream.close()
                else:
                    num_predicted += read(stream).stats.num_predicted_tokens
                    said[f"{index} {stream.reply.stats.num_prompt_tokens}"] = stream.reply.token_ids
                    said[f"{index} logprobs"] = [token.logprob for token in stream.reply.logprobs]
                continue
            if index in sessions and dice.random() < 0.2:
                sessions.pop(index).close()
            if index not in sessions:
                sessions[index] = apps[index % 2].session()
            ids = random_ids(dice.choice((1, 40, 110, 180, 245)), seed=index // 4)
            params = sampling(NUM_TOKENS, temperature=float(index % 2), seed=index, logprobs=0)
            streams[index] = sessions[index].submit_ids(ids, params, prefill=mode)
        for index, stream in streams.items():
            said[f"last {index}"] = read(stream).token_ids
        for _ in range(2):  # each pushes others out of memory, and comes back
            for index in range(5):
                session = apps[0].session(f"turn {index}")
                said[f"turn {index}"] = answer(
                    session, random_ids(170, index), sampling(3)
                ).token_ids
                session.close()
        runtime.check_integrity()
        said["logits"] = np.round(runtime.logits(random_ids(60))[-1].astype(float), 5).tolist()
        kept = answer(apps[0].session("kept"), random_ids(200, seed=7), sampling(8))
        counted = runtime._engine.counters().swap
        said["predicted"] = num_predicted > 0
        said["num_io_errors"] = counted.num_io_errors
        said["num_swap_outs"] = counted.num_swap_outs  # as time would have it
    with Runtime.open(model, config=config) as runtime:
        session = runtime.app("one").session("kept")
        ids = [*random_ids(200, seed=7), *kept.token_ids, 5, 6, 7]
        again = answer(session, ids, sampling(8))
        said["kept"] = [kept.token_ids, again.token_ids, again.stats.num_restored_tokens]
    return said


def often(_self, request, unsure):
    """Far more is shown ahead than the gate would let through."""
    return unsure.margin > 0.05 * (request.num_generated % 4)


def read(stream):
    """A stream to its end."""
    with stream:
        for _ in stream:
            pass
    return stream.reply


def capacity_for(model, num_sessions):
    """Bytes of a pool for so many sessions of 128 tokens, of what a rank has of each."""
    place = launched()
    config, _ = parse_checkpoint(open_checkpoint(pathlib.Path(model), profile()))
    if place is not None:
        config = Part(place.rank, place.size).config(config, model)
    layout = kv_layout(config, profile())
    group_bytes = Staging.rounded(BLOCK_TOKENS * layout.token_bytes + layout.state_bytes)
    staging_bytes = 2 * STAGING_SHARE * group_bytes  # so that there is any
    return max(staging_bytes, num_sessions * layout.capacity_bytes(layout.capacity_for(128)))


def main():
    place = launched()
    with contextlib.ExitStack() as stack:
        for name, value in CONSTANTS.items():
            stack.enter_context(unittest.mock.patch(name, value))
        stack.enter_context(unittest.mock.patch.object(PredictedPrefill, "goes_ahead", often))
        if place is not None and place.rank:
            return follow(place)
        folder, *models = sys.argv[1:]
        said = {}
        for index, model in enumerate(models):
            said[model] = play(model, pathlib.Path(folder) / str(index))
        sys.stdout.write(json.dumps(said) + "\n")
        return 0


if __name__ == "__main__":
    sys.exit(main())
