"""One rank of a model in a process of its own: python ring_child.py MODEL IDS OUT.

MLX's ring finds the others by MLX_RANK and MLX_HOSTFILE. Logits go to OUT: those of the text in one
go, in chunks, and token by token.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from edgekv.models.open_model import open_decoder  # before MLX, which takes its libraries

# isort: split
import mlx.core as mx
import numpy as np
from stepping import CPU_PROFILE, Stepper

from edgekv.kv.session_kv import SessionKV
from edgekv.ranks.group import Group


class _Stepper(Stepper):
    def step(self, work: Sequence[tuple[SessionKV, Sequence[int]]]) -> list[np.ndarray]:
        self.decoder.group.begin()
        return super().step(work)


def main() -> None:
    """Run one rank."""
    model, ids, out = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    group = Group(mx.distributed.init(strict=True, backend="ring"))
    stepper = _Stepper(open_decoder(model, CPU_PROFILE, group=group))
    np.savez(
        out,
        once=stepper.logits(ids),
        chunks=stepper.logits(ids, chunks=[7, 1, 1, 20]),
        steps=stepper.logits(ids, chunks=[len(ids) - 8] + [1] * 8),
    )


if __name__ == "__main__":
    main()
