"""From options to what the engine thread works with: the model, its KV pool, its store."""

import contextlib
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from edgekv.config import RuntimeConfig, StoreOptions, SwapOptions
from edgekv.device import DeviceProfile
from edgekv.engine.engine import Loaded
from edgekv.engine.prefill import ExactPrefill
from edgekv.engine.writes import Staging
from edgekv.errors import PoolTooSmall, StoreBusy, StoreError
from edgekv.kv.layout import BLOCK_TOKENS, KVLayout
from edgekv.kv.pool import KVPool
from edgekv.models.cache import kv_dir
from edgekv.models.fingerprint import weights_fingerprint
from edgekv.models.open_model import open_decoder
from edgekv.runtime.predictors import load_prefill
from edgekv.sched.memory import tokens_max
from edgekv.store import LayerState, Store
from edgekv.store.files import OS_FILES, Files
from edgekv.store.folder import folder_lock, store_folders

STAGING_SHARE = 8  # staging takes at most one part in this many of the pool's budget
GROUPS_MIN = 2  # one is gathered while the other is written
_PRIVATE = "private"  # begins the folder's name of a store that dies with its process


def load(
    path: Path,
    model: str,
    device: DeviceProfile,
    config: RuntimeConfig,
    tokenizer: str,
    files: Files = OS_FILES,
) -> tuple[Loaded, str]:
    """Load the model, open its store, set memory aside; and a warning or "".

    Runs on the engine thread.

    Raises:
        ModelError: The model cannot be loaded.
        PoolTooSmall: The pool cannot hold even a short session.
        StoreError: The store's folder cannot be used.
    """
    mx.set_cache_limit(device.freed_bytes_max)  # what loading frees is cached, too
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    decoder = open_decoder(path, device)
    layout = KVLayout(
        heads=tuple((layer.num_kv_heads, layer.head_dim) for layer in decoder.config.layers),
        dtype_bytes=dtype.size,
        context_max=min(
            decoder.config.context_max, config.context_max or decoder.config.context_max
        ),
    )
    whole_bytes = budget_bytes = config.pool_bytes or device.pool_bytes
    prefill = ExactPrefill()
    if config.prediction.wanted:
        prefill = load_prefill(
            decoder, path, model, device, config.prediction, tokenizer, layout, budget_bytes
        )
        budget_bytes -= prefill.budget_bytes
    wants_store = config.swap.mode != "off" and config.store.disk_bytes > 0
    staging = make_staging(config.swap, layout, budget_bytes if wants_store else 0)
    pool = KVPool(layout, dtype, budget_bytes, staging_bytes=staging.total_bytes)
    _check_pool(pool, whole_bytes, budget_bytes)
    store, warning = None, ""
    if wants_store:
        fingerprint = weights_fingerprint(
            path, tokenizer, device.compute_dtype, device.keeps_quantised
        )
        layers = tuple(
            LayerState(
                dtype=device.compute_dtype, dtype_bytes=dtype.size, num_heads=heads, head_dim=dim
            )
            for heads, dim in layout.heads
        )
        store, warning = open_store(model, fingerprint, layers, config.store, files)
    loaded = Loaded(decoder=decoder, pool=pool, staging=staging, store=store, prefill=prefill)
    return loaded, warning


def _check_pool(pool: KVPool, whole_bytes: int, budget_bytes: int) -> None:
    """Make sure that the budget of exact KV, a part of the whole, holds a session."""
    layout = pool.layout
    if tokens_max(layout, pool.snapshot().sessions_bytes) >= 2:
        return
    needed = layout.capacity_bytes(layout.capacity_for(1))
    needed = -(-needed * whole_bytes // budget_bytes)  # prediction takes its part of all
    raise PoolTooSmall(
        f"a pool of {whole_bytes} bytes holds no session of this model",
        hint=f"give it at least {needed} bytes ({needed / (1 << 30):.3f} GiB)",
    )


def make_staging(options: SwapOptions, layout: KVLayout, budget_bytes: int) -> Staging:
    """Buffers of whole blocks; none where the pool is too small to spare any."""
    spare_bytes = min(options.staging_bytes, budget_bytes // STAGING_SHARE)
    group_bytes = min(options.group_bytes, spare_bytes // GROUPS_MIN)
    block_bytes = BLOCK_TOKENS * layout.token_bytes
    # A group holds a block at least, however many bytes that is.
    buffer_bytes = max(1, group_bytes // block_bytes) * block_bytes
    num_buffers = spare_bytes // Staging.rounded(buffer_bytes)
    if options.mode == "off" or num_buffers < GROUPS_MIN:
        num_buffers = 0
    return Staging(num_buffers=num_buffers, buffer_bytes=buffer_bytes)


def open_store(
    model: str,
    fingerprint: str,
    layers: Sequence[LayerState],
    options: StoreOptions,
    files: Files = OS_FILES,
) -> tuple[Store, str]:
    """The store of this model's KV, and a warning or "".

    Where another process has it, this one gets a store of its own that dies with it: its sessions
    swap as usual, and are not kept.

    Raises:
        StoreError: The store's folder cannot be used.
    """
    root = options.folder or kv_dir()
    _remove_stale(root)

    def opened(name: str) -> Store:
        return Store.open(
            root,
            model=model,
            fingerprint=name,
            layers=layers,
            disk_bytes=options.disk_bytes,
            free_reserve_bytes=options.free_reserve_bytes,
            files=files,
        )

    try:
        return opened(fingerprint), ""
    except StoreBusy as busy:
        private = _PRIVATE + secrets.token_hex(16)
        return opened(private), f"warning: {busy}; the sessions of this one are not kept"


def is_private(store: Store) -> bool:
    """Whether a store dies with its process."""
    return store.folder.name.startswith(_PRIVATE)


def close_store(store: Store) -> None:
    """Close a store; a private one is removed."""
    store.close()
    if is_private(store):
        shutil.rmtree(store.folder, ignore_errors=True)


def _remove_stale(root: Path) -> None:
    """Remove private stores of processes that were killed."""
    with contextlib.suppress(StoreError):  # opening a store will say what is wrong with the root
        for folder in store_folders(root):
            if folder.name.startswith(_PRIVATE):
                with contextlib.suppress(StoreBusy), folder_lock(folder):
                    shutil.rmtree(folder, ignore_errors=True)
