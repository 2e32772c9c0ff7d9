"""What the device can do: the only module that knows which one it is.

Metal, the product, MLX's CPU backend, the workbench, and its CUDA backend differ in which types are
fast, which ops are fused and how much memory may be used. `DeviceProfile` holds that as values:
everybody else asks for a property and never for a name.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from edgekv.errors import ConfigError

if TYPE_CHECKING:
    import mlx.core as mx

BLAS_HINT = "apt-get install libopenblas0-pthread"

_FREED_BYTES_MAX = 512 << 20
_CUDA_WHEELS = ("mlx-cuda-13", "mlx-cuda-12")
_AMPERE = 8  # the compute capability from which on the hardware multiplies bfloat16

_blas: Literal["system", "openblas", "reference", "too late"] = "system"


def put_blas_in_front() -> None:
    """Load OpenBLAS globally, so that MLX's CPU backend binds to it (Linux only).

    MLX's Linux wheel links reference BLAS: f32 matmul then runs at about 1% of OpenBLAS's speed.
    Symbols are bound when MLX is first imported, so this must come before.
    """
    global _blas
    if sys.platform != "linux" or _blas != "system":
        return
    if "mlx.core" in sys.modules and not _has_symbol("openblas_get_config"):
        _blas = "too late"
        return
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        _blas = "reference"
    else:
        _blas = "openblas"


def _keep_freed_pages() -> None:
    """Let glibc's malloc keep large blocks that were freed, for the next allocation.

    MLX's CPU backend caches 32 MiB of freed buffers at most. By default what is freed beyond goes
    back to the system, and the next buffer costs a page fault every 4 KiB: 0.4 to 4 ms per MB,
    against 0.05. That is 0.4 s for the KV of 2,000 tokens, a gap that others who decode would see.
    """
    if sys.platform != "linux" or not _has_symbol("mallopt"):
        return
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # M_…, of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    # Threads would get up to eight heaps a core, each of which keeps what was freed in it: a
    # process that opens and closes runtimes grew by half.
    mallopt(arena_max, 2)


def give_back_freed_pages() -> None:
    """Return what `_keep_freed_pages` kept to the system: under pressure, and when all is over."""
    if sys.platform == "linux" and _has_symbol("malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _has_symbol(name: str) -> bool:
    return hasattr(ctypes.CDLL(None), name)


# --- streams ---

# MLX never ends the native thread of a stream, and makes streams for each thread that computes. So
# they are lent, to one thread after the other; none of these has anything to do.
_idle_streams: dict[str, list["mx.Stream"]] = {"cpu": [], "gpu": []}
_lending = threading.Lock()
_lent = threading.local()  # `second`: the thread's second stream on the CPU


def _borrow(kind: Literal["cpu", "gpu"]) -> "mx.Stream":
    import mlx.core as mx

    with _lending:
        if _idle_streams[kind]:
            return _idle_streams[kind].pop()
        return mx.new_thread_unsafe_stream(getattr(mx, kind))


@contextlib.contextmanager
def lent_streams() -> Iterator[None]:
    """Streams of its own for a thread that computes for a while; it begins with this."""
    import mlx.core as mx

    kinds: list[Literal["cpu", "gpu"]] = ["cpu"]
    if mx.default_device().type == mx.gpu:
        kinds.append("gpu")
    firsts = {kind: _borrow(kind) for kind in kinds}
    for stream in firsts.values():
        mx.set_default_stream(stream)
    try:
        yield
    finally:
        lent = [*firsts.items(), ("cpu", _lent.__dict__.pop("second", None))]
        for _, stream in lent:
            if stream is not None:
                mx.synchronize(stream)
        # Of those that MLX has made for this thread all the same: destroyed at exit, while they
        # run, they abort the process.
        mx.clear_streams()
        with _lending:
            for kind, stream in lent:
                if stream is not None:
                    _idle_streams[kind].append(stream)


def second_stream() -> "mx.Stream":
    """A second stream on the CPU for the calling thread, the same one at each call."""
    if not hasattr(_lent, "second"):
        _lent.second = _borrow("cpu")
    stream: mx.Stream = _lent.second
    return stream


def works_after_fork() -> bool:
    """Whether MLX works in a process whose parent had loaded it at the fork.

    Once the parent has computed anything, its streams' threads are waited for in vain. Apple's
    frameworks work in no child, whatever the parent did; CUDA in none whose parent had asked it
    for anything, which asking MLX for its memory does.
    """
    import mlx.core as mx

    if mx.cuda.is_available():
        return False
    num_bytes = mx.get_active_memory() + mx.get_cache_memory() + mx.get_peak_memory()
    return sys.platform != "darwin" and num_bytes == 0


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """The device as the rest of edgekv sees it."""

    backend: Literal["metal", "cuda", "cpu"]  # for reports only; code asks for what follows
    name: str  # the device's own
    compute_dtype: Literal["bfloat16", "float32"]  # of plain weights, activations and KV
    keeps_quantised: bool  # quantised weights stay so, else become `compute_dtype` on load
    fused_rope: bool  # `mx.fast.rope` is one kernel (else 13 ops, and cos/sin tables pay)
    fused_attention: bool  # `mx.fast.scaled_dot_product_attention` is one kernel
    # Query rows of a prefill chunk that attend together. Without a fused kernel a tile computes
    # scores above the diagonal for nothing, so small tiles pay.
    attention_tile_rows: int
    # Of one step's prefill: more gain nothing in speed and cost latency and activation memory.
    prefill_rows_max: int
    memory_bytes: int  # that the device may use
    pool_bytes: int  # default KV budget
    blas: str  # that multiplies; on CPU the one that was found
    # Rows that chose the same expert are multiplied together: no kernel gathers them.
    tiles_experts: bool = False
    # It is worth measuring how a few rows times a matrix are fastest (see `edgekv.models.split`).
    measures_few_rows: bool = False
    # Of buffers that MLX keeps when they are freed, beside all budgets; its own limit on CPU.
    freed_bytes_max: int = 32 << 20
    # MLX's CUDA wheel that is installed, and whose library is not the one that was loaded.
    hidden_wheel: str = ""

    @property
    def warning(self) -> str:
        """One line that a user should see once, or an empty string."""
        if self.backend == "cpu" and self.blas == "reference":
            return f"warning: OpenBLAS not found, matmul runs 50-100x slower; cure: {BLAS_HINT}"
        if self.backend == "cpu" and self.blas == "too late":
            return (
                "warning: mlx was imported before edgekv, matmul may be slow; import edgekv first"
            )
        if wheel := self.hidden_wheel:
            return (
                f"warning: {wheel} is installed, but mlx-cpu took its place; cure: "
                f"pip install --force-reinstall --no-deps {wheel}"
            )
        return ""


@functools.cache
def profile() -> DeviceProfile:
    """The profile of MLX's default device (imports MLX)."""
    import mlx.core as mx

    is_gpu, has_cuda = mx.default_device().type == mx.gpu, mx.cuda.is_available()
    if is_gpu and has_cuda:
        return _cuda(mx.device_info())
    if is_gpu and mx.metal.is_available():
        return _metal(mx.device_info())
    return replace(_cpu(), hidden_wheel="" if has_cuda else _installed_cuda_wheel())


def _installed_cuda_wheel() -> str:
    """The name of MLX's CUDA wheel, if one is installed.

    It has its library at the same path as mlx-cpu, so the one that was installed last is loaded.
    """
    for name in _CUDA_WHEELS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return name
    return ""


def loading_hint(error: ImportError) -> str:
    """What helps if MLX cannot be loaded."""
    if "libcuda" in str(error):
        return (
            "MLX's CUDA wheel needs NVIDIA's driver; without one: "
            "pip install --force-reinstall --no-deps mlx-cpu"
        )
    return "pip install --force-reinstall edgekv"


def _metal(info: Mapping[str, Any]) -> DeviceProfile:
    working_set = int(info["max_recommended_working_set_size"])
    return DeviceProfile(
        backend="metal",
        name=str(info.get("device_name", "Apple GPU")),
        compute_dtype="bfloat16",
        keeps_quantised=True,
        fused_rope=True,
        fused_attention=True,
        attention_tile_rows=1 << 20,
        prefill_rows_max=1024,
        memory_bytes=working_set,
        # The working set also holds the weights, buffers that were freed, and every other app's
        # GPU memory.
        pool_bytes=(working_set - _FREED_BYTES_MAX) // 4,
        # Unlimited by default, and a prefill of many lengths leaves activations of many sizes. The
        # largest of a step is (1024, 14k) in bf16, 28 MiB; this holds those of several layers, and
        # is a tenth of what an 8 GB Mac may use.
        freed_bytes_max=_FREED_BYTES_MAX,
        blas="accelerate",
    )


def _cuda(info: Mapping[str, Any]) -> DeviceProfile:
    """NVIDIA's GPUs, from what MLX's source says: nobody has run this on one.

    A buffer that is exported (`memoryview`) moves to memory that host and GPU share, and stays
    there; what reads KV from disk and writes it does work so, at a price that is not known.

    Raises:
        ConfigError: CUDA shows no device.
    """
    if not info.get("total_memory"):
        raise ConfigError(
            "MLX's CUDA backend finds no device",
            hint="see what nvidia-smi and CUDA_VISIBLE_DEVICES say",
        )
    # Nine tenths are MLX's own limit; nothing swaps, and others compute and draw there, too.
    total = int(info["total_memory"])
    memory = min(total * 9 // 10, int(info.get("free_memory", total)))
    # Older ones multiply bfloat16 by emulation, if at all.
    has_bfloat16 = int(info.get("compute_capability_major", 0)) >= _AMPERE
    return DeviceProfile(
        backend="cuda",
        name=str(info.get("device_name", "NVIDIA GPU")),
        compute_dtype="bfloat16" if has_bfloat16 else "float32",
        keeps_quantised=True,
        fused_rope=True,
        # Where no kernel fits (heads wider than 128, float32 chunks) MLX composes it by itself.
        fused_attention=True,
        attention_tile_rows=1 << 20,
        prefill_rows_max=2048,  # as mlx-lm has it
        memory_bytes=memory,
        # The rest is for weights and activations, as on Metal.
        pool_bytes=max(0, memory - _FREED_BYTES_MAX) // 4,
        freed_bytes_max=_FREED_BYTES_MAX,
        blas="cublas",
    )


def _cpu() -> DeviceProfile:
    _keep_freed_pages()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceProfile(
        backend="cpu",
        name=_processor_name(),
        compute_dtype="float32",
        # Quantised and 16-bit matmul run at 2-6 GFLOPS here, f32 at hundreds.
        keeps_quantised=False,
        fused_rope=False,
        fused_attention=False,
        attention_tile_rows=128,
        prefill_rows_max=256,
        memory_bytes=memory,
        pool_bytes=memory // 8,
        blas="accelerate" if sys.platform == "darwin" else _blas,
        tiles_experts=True,
        measures_few_rows=_blas == "openblas" and (os.cpu_count() or 1) >= 2,
    )


def _processor_name() -> str:
    """The processor as its maker calls it; Linux keeps that in a file, macOS in `processor()`."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def system_name() -> str:
    """The operating system, its version and the machine's architecture, for reports."""
    return platform.platform()
