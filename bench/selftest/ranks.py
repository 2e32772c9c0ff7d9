"""What a group of ranks costs: a program that is launched as each of them.

Collectives are timed, and decode steps of a model: of each rank's part on all ranks at once, once
without a word between them, and once as in earnest, which takes more than both. Who waits for the
slower rank at each collective waits longer than for the slower one of all, and ranks of one machine
take cores from each other while they wait. Rank 0 prints the figures.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from edgekv.bench.selftest.logits import Stepper
from edgekv.device import DeviceProfile, profile
from edgekv.errors import EdgeKVError
from edgekv.models.decoder import Decoder
from edgekv.models.hub import resolve
from edgekv.models.open_model import open_decoder
from edgekv.ranks.estimate import LARGE, ORDERS_BYTES, Cost, Shape
from edgekv.ranks.group import Group
from edgekv.ranks.launched import Launched, end_with_launcher, join, launched
from edgekv.ranks.liveness import Liveness
from edgekv.ranks.verdict import LOADING

DECODE_ROWS = (1, 2, 4, 8)
PREFILL_ROWS = (256, 512)
_CHAIN = 8  # collectives of one graph, as those of a step's layers are
_BUDGET_S = 1.0  # of each size
_RUNS_MIN, _RUNS_MAX = 3, 50
_CONTEXT_TOKENS, _STEPS = 64, 16

Figures = dict[str, Any]


class _Place(Group):
    """A rank's place in a group, and what it tells the others of; `is_silent`: it would tell."""

    def __init__(self, group: Group) -> None:
        super().__init__(group.raw)
        self.is_silent = True
        self.messages: list[int] = []  # bytes of each, of the last step

    def begin(self) -> None:
        super().begin()
        self.messages = []

    def all_sum(self, x: mx.array) -> mx.array:
        self.messages.append(x.nbytes)
        return x if self.is_silent else super().all_sum(x)

    def all_max(self, x: mx.array) -> mx.array:
        self.messages.append(x.nbytes)
        return x if self.is_silent else super().all_max(x)

    def all_gather(self, x: mx.array) -> mx.array:
        self.messages.append(x.nbytes * self.size)
        return mx.concatenate([x] * self.size) if self.is_silent else super().all_gather(x)


def measure(group: Group, model: str | None) -> Figures:
    """All figures; every rank calls it, and has the same."""
    device = profile()
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    shape, messages, part_s, step_s = LARGE, LARGE.messages(1, dtype.size), None, None
    if model is not None:
        place = _Place(group)
        decoder = open_decoder(resolve(model), device, group=place)
        config = decoder.config
        shape = Shape(
            name=model,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )
        part_s, step_s = _steps_s(decoder, device, place)
        messages = place.messages
    sums = [_sum_figures(group, n, shape.hidden_size, dtype) for n in DECODE_ROWS + PREFILL_ROWS]
    cost = Cost([(one["bytes"], one["median_s"]) for one in sums])
    waits_s = cost.waits_s(messages)
    token_s = waits_s if step_s is None else step_s + cost.seconds(ORDERS_BYTES)
    return {
        "dtype": device.compute_dtype,
        "sums": sums,
        "shape": shape.__dict__,
        "num_collectives": len(messages) + 1,
        "decode_waits_s": waits_s,
        "prefill_rows": PREFILL_ROWS[-1],
        "prefill_waits_s": cost.waits_s(shape.messages(PREFILL_ROWS[-1], dtype.size)),
        "part_s": part_s,
        "step_s": step_s,
        "tokens_per_s": 1.0 / token_s,
    }


def _sum_figures(group: Group, num_rows: int, width: int, dtype: mx.Dtype) -> Figures:
    """Median and worst seconds of the sum of so many rows."""
    rows = mx.zeros((num_rows, width), dtype)
    mx.eval(rows)

    def run() -> None:
        group.begin()
        total = rows
        for _ in range(_CHAIN):
            total = group.all_sum(total)
        mx.eval(total)

    run()
    first_s = _slowest(group, _timed(run))
    num_runs = int(min(max(_BUDGET_S / first_s, _RUNS_MIN), _RUNS_MAX))
    times_s = [_timed(run) / _CHAIN for _ in range(num_runs)]
    return {
        "rows": num_rows,
        "bytes": rows.nbytes,
        "median_s": median(times_s),
        "worst_s": max(times_s),
        "num_runs": num_runs,
    }


def _steps_s(decoder: Decoder, device: DeviceProfile, place: _Place) -> tuple[float, float]:
    """Seconds of a decode step over a short context, without a word to the others and with."""
    stepper = Stepper(decoder, device, [_CONTEXT_TOKENS + _STEPS] * 2)

    def run(session: int, ids: list[int]) -> None:
        place.begin()
        stepper.step([(session, ids)])

    seconds = []
    for session, is_silent in enumerate((True, False)):
        place.is_silent = is_silent
        run(session, [1] * _CONTEXT_TOKENS)
        times_s = [_timed(partial(run, session, [1])) for _ in range(_STEPS)]
        seconds.append(_slowest(place, median(times_s)))
    return seconds[0], seconds[1]


def _timed(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _slowest(group: Group, seconds: float) -> float:
    """The most of all ranks' figures; they wait for each other here."""
    said = np.zeros(group.size, np.int32)
    said[group.rank] = max(1, round(seconds * 1e6))
    return float(group.exchange(said).max()) / 1e6


def _failed(_rank: int, reason: str) -> None:
    os.write(2, f"error: {reason}\n".encode())
    os._exit(1)


def _run(mine: Launched, model: str | None) -> Figures:
    liveness = Liveness(mine, _failed)
    liveness.start()
    try:
        group = join(mine)
        liveness.note(0, LOADING)
        figures = measure(group, model)
    except EdgeKVError as error:
        liveness.fail(str(error))
        raise
    liveness.close()
    return figures


def main() -> int:
    """Measure as the rank that this process was launched as; rank 0 prints."""
    mine = launched()
    assert mine is not None
    end_with_launcher(mine)
    try:
        figures = _run(mine, json.loads(sys.argv[1])["model"])
    except EdgeKVError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if mine.rank == 0:
        sys.stdout.write(json.dumps({"hosts": mine.hosts, "backend": mine.backend, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
