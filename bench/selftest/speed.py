"""How fast matrices, attention and the disk are, and a floor below which something is off."""

import os
import pathlib
import secrets
import tempfile
from collections.abc import Callable
from statistics import median

import mlx.core as mx

from edgekv.bench.figures import Stopwatch
from edgekv.bench.scratch import NO_STORE
from edgekv.bench.selftest.checks import CheckResult
from edgekv.config import RuntimeConfig, Sampling
from edgekv.device import BLAS_HINT, DeviceProfile
from edgekv.runtime import Runtime

_REPEATS = 5
# Without OpenBLAS a Linux CPU multiplies float32 at about 4 GFLOPS, with it at 50 a core and more.
_MATMUL_GFLOPS_MIN = 15.0
_DISK_BYTES = 256 << 20
_CHUNK_BYTES = 8 << 20
_TARGET_TOKENS = 32
_F_NOCACHE = 48  # of macOS; Python elsewhere does not have the name


def check_matmul_speed(device: DeviceProfile) -> CheckResult:
    """A prefill-like product in GFLOPS and a decode-like one in GB/s of weights."""
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    rows, inner, columns = 512, 2048, 2048
    x = mx.random.normal((rows, inner)).astype(dtype)
    weight = mx.random.normal((columns, inner)).astype(dtype)
    gflops = 2e-9 * rows * inner * columns / _best_s(lambda: x @ weight.T)
    gb_per_s = 1e-9 * weight.nbytes / _best_s(lambda: x[:1] @ weight.T)
    slow = gflops < _MATMUL_GFLOPS_MIN
    detail = f"{device.compute_dtype}: {gflops:.0f} GFLOPS, one row {gb_per_s:.1f} GB/s"
    if slow:
        missing = device.blas in ("reference", "too late")
        detail += f"; OpenBLAS missing? {BLAS_HINT}" if missing else "; is the machine busy?"
    return CheckResult(
        name="matmul speed",
        status="warn" if slow else "pass",
        detail=detail,
        figures={"gflops": gflops, "gb_per_s": gb_per_s},
    )


def check_attention_speed(device: DeviceProfile) -> CheckResult:
    """One row over 4096 tokens in GB/s of KV, and a causal chunk of 512 rows in GFLOPS."""
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    heads, tokens, rows, dim = 8, 4096, 512, 64
    keys, values = (mx.random.normal((1, heads, tokens, dim)).astype(dtype) for _ in range(2))
    queries = mx.random.normal((1, heads, rows, dim)).astype(dtype)

    def attention(num_rows: int, num_tokens: int) -> mx.array:
        return mx.fast.scaled_dot_product_attention(
            queries[:, :, :num_rows],
            keys[:, :, :num_tokens],
            values[:, :, :num_tokens],
            scale=dim**-0.5,
            mask="causal" if num_rows > 1 else None,
        )

    gb_per_s = 1e-9 * (keys.nbytes + values.nbytes) / _best_s(lambda: attention(1, tokens))
    flops = 4 * heads * rows * rows * dim  # half of the square is masked, but computed
    gflops = 1e-9 * flops / _best_s(lambda: attention(rows, rows))
    return CheckResult(
        name="attention speed",
        status="pass",
        detail=f"{device.compute_dtype}: one row {gb_per_s:.1f} GB/s of KV, "
        f"512 rows {gflops:.0f} GFLOPS",
        figures={"gflops": gflops, "gb_per_s": gb_per_s},
    )


def _best_s(build: Callable[[], mx.array]) -> float:
    """Seconds of the fastest of several evaluations; others may be using the machine too."""
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first allocates and compiles
        watch = Stopwatch()
        mx.eval(build())
        best = min(best, 1e-3 * watch.ms())
    return best


def check_disk(folder: pathlib.Path, *, num_bytes: int = _DISK_BYTES) -> CheckResult:
    """Write and read back a file in the cache folder, past the operating system's own cache.

    Raises OSError: The folder cannot be written to, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunk = secrets.token_bytes(_CHUNK_BYTES)  # random: some disks compress
    offsets = range(0, num_bytes, _CHUNK_BYTES)
    buffer = bytearray(_CHUNK_BYTES)
    read_s, same = 0.0, True
    with tempfile.TemporaryFile(dir=folder) as file:
        fd = file.fileno()
        watch = Stopwatch()
        for offset in offsets:
            assert os.pwrite(fd, chunk, offset) == _CHUNK_BYTES
        os.fsync(fd)
        write_s = 1e-3 * watch.ms()
        _forget_cached(fd)
        for offset in offsets:
            watch = Stopwatch()
            count = os.preadv(fd, [buffer], offset)
            read_s += 1e-3 * watch.ms()
            same = same and count == _CHUNK_BYTES and buffer == chunk
    write_gb_per_s, read_gb_per_s = 1e-9 * num_bytes / write_s, 1e-9 * num_bytes / read_s
    return CheckResult(
        name="disk",
        status="pass" if same else "fail",
        detail=f"write {write_gb_per_s:.2f} GB/s (with fsync), read {read_gb_per_s:.2f} GB/s"
        if same
        else f"what was read from {folder} is not what was written",
        figures={"write_gb_per_s": write_gb_per_s, "read_gb_per_s": read_gb_per_s},
    )


def _forget_cached(fd: int) -> None:
    """Ask the operating system to read this file from the disk, not from its memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        import fcntl

        fcntl.fcntl(fd, _F_NOCACHE, 1)


def check_target(path: pathlib.Path, name: str) -> CheckResult:
    """What one session that decodes is promised here: no floor, a fact."""
    config = RuntimeConfig(store=NO_STORE)
    with Runtime.open(str(path), config=config) as runtime, runtime.app().session() as session:
        sampling = Sampling(max_tokens=_TARGET_TOKENS, ignore_eos=True)
        gaps_ms = session.respond("Hello", sampling=sampling).gaps_ms
        target_ms = runtime.counters().tbt_target_ms
    return CheckResult(
        name=f"time between tokens of {name}",
        status="pass",
        detail=f"{median(gaps_ms):.0f} ms alone; beside others' prompts at most about "
        f"{target_ms:.0f} ms (tbt_target_ms)",
        figures={"gap_ms": median(gaps_ms), "tbt_target_ms": target_ms},
    )
