"""From options to what the engine thread works with: the model, its KV pool, its store."""

import contextlib
import functools
import math
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from xxhash import xxh3_64_hexdigest, xxh3_128_hexdigest

from edgekv import __version__
from edgekv.config import PredictionOptions, RuntimeConfig, StoreOptions, SwapOptions
from edgekv.device import DeviceProfile
from edgekv.engine.engine import Loaded
from edgekv.engine.predicted import PredictedPrefill, side_bytes
from edgekv.engine.prefill import ExactPrefill
from edgekv.engine.writes import PAGE_BYTES, Staging
from edgekv.errors import EdgeKVError, EngineFailed, PoolTooSmall, StoreBusy, StoreError
from edgekv.kv.layout import BLOCK_TOKENS, DTYPE_BYTES, KVLayout
from edgekv.kv.pool import KVPool
from edgekv.models.cache import kv_dir
from edgekv.models.config import prompt_macs
from edgekv.models.decoder import Decoder
from edgekv.models.fingerprint import kv_fingerprint, weights_fingerprint
from edgekv.models.kv_layout import kv_layout
from edgekv.models.open_model import OpenModel, open_decoder
from edgekv.models.remembered import recall, remember
from edgekv.predict.artifact import read_info
from edgekv.predict.gate import Gate
from edgekv.predict.opening import open_predictor
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import open_auxiliary
from edgekv.predict.shipped import find_predictor
from edgekv.predict.state import Prediction, side_layout
from edgekv.ranks.exchange import agree
from edgekv.ranks.group import ALONE, Group
from edgekv.ranks.orders import NO_ORDERS, Orders
from edgekv.sched.memory import tokens_max
from edgekv.store import LayerState, Store
from edgekv.store.disk_io import OS_FILES, Files
from edgekv.store.folder import folder_lock, store_folders
from edgekv.tokenizer import Tokenizer

STAGING_SHARE = 8  # staging takes at most one part in this many of the pool's budget
GROUPS_MIN = 2  # one is gathered while the other is written
# In the root of all stores:
FINGERPRINTS_NAME = "fingerprints.json"
GATES_NAME = "gates.json"  # what was learned of predictors, by the hash of their files
_PRIVATE = "private"  # begins the folder's name of a store that dies with its process
_TYPICAL_TOKENS = 1024  # at which the cost of a predicted row is compared with an exact one


def load(
    path: Path,
    model: str,
    tokenizer: Tokenizer,
    device: DeviceProfile,
    config: RuntimeConfig,
    files: Files = OS_FILES,
    group: Group = ALONE,
    orders: Orders = NO_ORDERS,
) -> Loaded:
    """Load the model, open its store, set memory aside. Runs on the engine thread.

    Of several ranks all do, and all have the same or none has anything: each its own part of the
    model and of the store, and as much memory for KV as the rank that has least.
    """
    mx.set_cache_limit(device.freed_bytes_max)  # what loading frees is cached, too
    with failing_for_all(group):
        decoder = open_decoder(path, device, config.context_max, group)
        digest = "" if group.size == 1 else _digest(path, tokenizer, device, config)
    pool_bytes = agree(group, digest, config.pool_bytes or device.pool_bytes)
    base = OpenModel(name=model, path=path, decoder=decoder, tokenizer=tokenizer, fingerprint="")
    with failing_for_all(group):
        loaded = _load_rest(base, device, config, pool_bytes, files, orders)
    agree(group, "", 0)
    return loaded


@contextlib.contextmanager
def failing_for_all(group: Group) -> Iterator[None]:
    """A block in the course of loading; what it raises the others are told, in its place."""
    try:
        yield
    except EdgeKVError as error:
        with contextlib.suppress(EngineFailed):  # another one cannot either
            agree(group, "", 0, str(error))
        raise


def _digest(path: Path, tokenizer: Tokenizer, device: DeviceProfile, config: RuntimeConfig) -> str:
    """Of what must be the same on all ranks."""
    what = [__version__, weights_fingerprint(path), tokenizer.fingerprint, device.compute_dtype]
    return xxh3_64_hexdigest(f"{what} {device.keeps_quantised} {config.context_max}".encode())


def _load_rest(
    base: OpenModel,
    device: DeviceProfile,
    config: RuntimeConfig,
    whole_bytes: int,
    files: Files,
    orders: Orders,
) -> Loaded:
    """What is beside the model: memory for KV, a predictor, the store."""
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    decoder = base.decoder
    # Predicted KV is repaired from the first token on; and where all is written when a session
    # leaves, all must be there.
    whole = config.prediction.wanted or config.swap.mode == "async"
    layout = kv_layout(decoder.config, device, whole_windows=whole)
    budget_bytes = whole_bytes
    prefill = ExactPrefill(snapshot_tokens=layout.snapshot_tokens)
    if config.prediction.wanted:
        base = replace(base, fingerprint=weights_fingerprint(base.path))
        memory = None
        if config.store.disk_bytes and not decoder.group.rank:
            memory = (config.store.folder or kv_dir()) / GATES_NAME
        prefill = _load_prefill(base, config.prediction, layout, budget_bytes, orders, memory)
        budget_bytes -= prefill.budget_bytes
    wants_store = config.swap.mode != "off" and config.store.disk_bytes > 0
    staging = _make_staging(config.swap, layout, budget_bytes if wants_store else 0)
    pool = KVPool(layout, dtype, budget_bytes, staging_bytes=staging.total_bytes, orders=orders)
    _check_pool(pool, whole_bytes, budget_bytes)
    store = None
    if wants_store:
        fingerprint = _kv_fingerprint(base, device, config)
        store = _open_store(
            base.name, fingerprint, layout, device.compute_dtype, config.store, files
        )
    return Loaded(decoder=decoder, pool=pool, staging=staging, store=store, prefill=prefill)


def _kv_fingerprint(base: OpenModel, device: DeviceProfile, config: RuntimeConfig) -> str:
    """Of all that KV depends on, this rank's part of it included."""
    beside: list[str | bool] = [
        base.tokenizer.fingerprint,
        device.compute_dtype,
        device.keeps_quantised,
    ]
    if any(layer.rope and layer.rope.for_short for layer in base.decoder.config.layers):
        beside.append("short")  # opened for a longer context it computes other KV
    group = base.decoder.group
    if group.size > 1:
        beside.append(f"part {group.rank} of {group.size}")
    memory = (config.store.folder or kv_dir()) / FINGERPRINTS_NAME
    return kv_fingerprint(base.path, *beside, memory=memory)


def _load_prefill(
    base: OpenModel,
    options: PredictionOptions,
    layout: KVLayout,
    budget_bytes: int,
    orders: Orders,
    memory: Path | None,
) -> PredictedPrefill:
    """Load the predictor, and its auxiliary if it has one; set a part of the budget aside."""
    dtype: mx.Dtype = getattr(mx, base.decoder.device.compute_dtype)
    file = find_predictor(base.name, options.predictor, base.fingerprint)
    aux = None
    if options.aux is not None and read_info(file).kind == "aux":
        aux = open_auxiliary(options.aux, base)
    opened = open_predictor(base, file, aux, dtype=dtype)
    gate = opened.info.gate
    key = xxh3_128_hexdigest(file.read_bytes())
    if memory is not None:
        gate = gate.with_experience(recall(memory).get(key))
    prediction = Prediction(
        predictor=opened.predictor,
        aux=opened.aux.decoder,
        row_share=_row_share(base.decoder, opened.aux.decoder, opened.predictor),
        gate=gate,
    )
    side_pool = KVPool(
        side_layout(prediction, layout),
        dtype,
        side_bytes(prediction, layout, budget_bytes),
        orders=orders,
        index=1,
    )

    def keep(gate: Gate) -> None:
        if memory is not None:
            others = {name: noted for name, noted in recall(memory).items() if name != key}
            remember(memory, others | {key: gate.experience})

    return PredictedPrefill(prediction, side_pool, options, base.decoder.config.num_layers, keep)


def _row_share(base: Decoder, aux: Decoder, predictor: Predictor) -> float:
    """What a predicted row costs, in multiplications, relative to an exact one."""
    predicted = prompt_macs(aux.config, 0, _TYPICAL_TOKENS, last_layer=predictor.depth)
    predicted += predictor.num_macs(base.config, 0, _TYPICAL_TOKENS)
    return predicted / prompt_macs(base.config, 0, _TYPICAL_TOKENS)


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


def session_tokens_max(layout: KVLayout, pool_bytes: int) -> int:
    """Most tokens that a session can hold in a pool whose sessions are kept; below 2 none can."""
    staging = _make_staging(SwapOptions(), layout, pool_bytes)
    return tokens_max(layout, pool_bytes - staging.total_bytes)


def _make_staging(options: SwapOptions, layout: KVLayout, budget_bytes: int) -> Staging:
    """Buffers of whole blocks; none where the pool is too small to spare any."""
    # A state, which may be larger than all of it, is written with a group.
    staging_bytes = options.staging_bytes and options.staging_bytes + 2 * layout.state_bytes
    spare_bytes = min(staging_bytes, budget_bytes // STAGING_SHARE)
    each_bytes = spare_bytes // GROUPS_MIN // PAGE_BYTES * PAGE_BYTES  # as they are rounded up
    group_bytes = min(options.group_bytes, each_bytes - layout.state_bytes)
    block_bytes = BLOCK_TOKENS * layout.token_bytes
    # A group holds a block at least, however many bytes that is.
    buffer_bytes = max(1, group_bytes // block_bytes) * block_bytes + layout.state_bytes
    num_buffers = spare_bytes // Staging.rounded(buffer_bytes)
    return Staging(
        num_buffers=num_buffers if num_buffers >= GROUPS_MIN else 0, buffer_bytes=buffer_bytes
    )


def _open_store(
    model: str,
    fingerprint: str,
    layout: KVLayout,
    dtype: str,
    options: StoreOptions,
    files: Files,
) -> Store:
    """The store of this model's KV.

    Where another process has it, this one gets a store of its own that dies with it: its sessions
    swap as usual, and are not kept.
    """
    root = options.folder or kv_dir()
    _remove_stale(root)
    opened = functools.partial(
        Store.open,
        root,
        model=model,
        layers=layer_states(layout, dtype),
        disk_bytes=options.disk_bytes,
        free_reserve_bytes=options.free_reserve_bytes,
        files=files,
    )
    try:
        return opened(fingerprint=fingerprint)
    except StoreBusy as busy:
        store = opened(fingerprint=_PRIVATE + secrets.token_hex(16))
        warning = f"warning: {busy}; the sessions of this one are not kept"
        print(warning, file=sys.stderr)  # noqa: T201 - nothing else would tell the user
        return store


def layer_states(layout: KVLayout, dtype: str) -> list[LayerState]:
    """What each layer keeps of a token, and then of all tokens, as the store says it."""
    states = []
    for heads in layout.heads:
        kind = "kv" if heads.value_dim else "latent" if heads.num else "none"
        assert heads.value_dim in {0, heads.key_dim}, "the store has no kind for this"
        states.append(
            LayerState(
                kind=kind,
                dtype=dtype,
                dtype_bytes=layout.dtype_bytes,
                num_heads=heads.num,
                head_dim=heads.key_dim,
            )
        )
    states += [
        LayerState(
            kind="state",
            dtype=array.dtype,
            dtype_bytes=DTYPE_BYTES[array.dtype],
            num_heads=array.shape[0],
            head_dim=math.prod(array.shape[1:]),
        )
        for arrays in layout.states
        for array in arrays
    ]
    return states


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
