"""A check that KV leaves the device as bytes and comes back, as it does on its way to SSD."""

import mlx.core as mx

from edgekv.bench.figures import Stopwatch
from edgekv.bench.selftest.checks import CheckResult
from edgekv.bench.selftest.tiny_decoder import HEAD_DIM
from edgekv.device import DeviceProfile
from edgekv.kv.layout import Heads, KVLayout
from edgekv.kv.pool import Buffers, KVPool
from edgekv.kv.runs import copy_out, token_runs
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import StagedView

_HEADS = (Heads(8, HEAD_DIM, HEAD_DIM),) * 4
_TOKENS = 4096
_PARTS = ((0, _TOKENS - 1), (_TOKENS - 1, _TOKENS))  # the device writes on behind an export


def check_transfer(device: DeviceProfile) -> CheckResult:
    """What the device computed is what the host reads, and what the host wrote, the device sees.

    A buffer that is not host memory moves when it is exported (CUDA), so a row that is computed
    behind that must be seen as well; the speeds tell what moving costs.
    """
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    layout = KVLayout(heads=_HEADS, dtype_bytes=dtype.size, context_max=_TOKENS)
    capacity = layout.capacity_for(_TOKENS)
    pool = KVPool(layout, dtype, 2 * layout.capacity_bytes(capacity))
    session = SessionKV()
    ours = session.buffers = pool.allocate(capacity)
    theirs = pool.allocate(capacity)
    mx.eval(ours.keys, ours.values, theirs.keys, theirs.values)
    host = memoryview(bytearray(_TOKENS * layout.token_bytes))
    seconds = {"out": 0.0, "in": 0.0}
    for start, end in _PARTS:
        _compute(session, start, end, dtype)
        watch = Stopwatch()
        payload = copy_out(token_runs(layout, ours, start, end), host)
        seconds["out"] += 1e-3 * watch.ms()
        watch = Stopwatch()
        _copy_in(payload, token_runs(layout, theirs, start, end))
        seconds["in"] += 1e-3 * watch.ms()
    same = _same(ours, theirs)
    speeds = {f"{way}_gb_per_s": 1e-9 * host.nbytes / took for way, took in seconds.items()}
    return CheckResult(
        name="KV leaves as bytes and comes back",
        status="pass" if same else "fail",
        detail=f"out {speeds['out_gb_per_s']:.2f} GB/s, in {speeds['in_gb_per_s']:.2f} GB/s"
        if same
        else "what came back is not what the device had computed",
        figures=speeds,
    )


def _compute(session: SessionKV, start: int, end: int, dtype: mx.Dtype) -> None:
    """Have the device write random tokens [start, end), as a step does."""
    view = StagedView(session, start)
    for layer, (num_kv_heads, head_dim, _) in enumerate(_HEADS):
        keys, values = (
            mx.random.normal((num_kv_heads, end - start, head_dim)).astype(dtype) for _ in range(2)
        )
        view.write(layer, keys, values)
    mx.eval(*view.commit())
    session.append(range(start, end))


def _copy_in(payload: memoryview, runs: list[memoryview]) -> None:
    position = 0
    for run in runs:
        run[:] = payload[position : position + run.nbytes]
        position += run.nbytes
    assert position == payload.nbytes


def _same(ours: Buffers, theirs: Buffers) -> bool:
    """Whether the first tokens are equal, as the device sees them."""
    equal = [
        mx.array_equal(a[:, :_TOKENS], b[:, :_TOKENS])
        for a, b in zip(ours.keys + ours.values, theirs.keys + theirs.values, strict=True)
    ]
    return bool(mx.all(mx.stack(equal)).item())
