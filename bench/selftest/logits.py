"""Checks of whole decoders: what is packed, chunked and decoded equals what is computed at once."""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from edgekv.bench.selftest.checks import CheckResult, error_check, relative_error
from edgekv.bench.selftest.tiny_decoder import tiny_decoder
from edgekv.device import DeviceProfile
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import StagedView
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.decoder import Decoder
from edgekv.models.kv_layout import kv_layout
from edgekv.models.open_model import open_decoder

# How far two ways of computing the same may differ by rounding alone, see `relative_error`.
# bfloat16 keeps 8 significant bits, and a value passes through dozens of roundings; float32 is
# allowed what fast cosines and reduced-precision matrix units cost on a GPU.
_TOLERANCE = {"bfloat16": 1.5e-1, "float32": 2e-3}
# Prompt chunks of three sessions: two prefill beside a third that decodes already. Chunk borders
# are odd on purpose.
_CHUNKS = ((20, 17), (31, 42), (9,))
_NUM_DECODED = 4


def check_packed(device: DeviceProfile) -> CheckResult:
    """Tiny decoders as this device runs them: in its dtype and in float32, dense and quantised."""
    errors = {}
    for variant, each, bits in _variants(device):
        error = packed_error(tiny_decoder(each, bits=bits), each)
        errors[variant] = (error, _TOLERANCE[each.compute_dtype])
    return error_check("packed steps equal one-shot", errors)


def check_reference(device: DeviceProfile) -> CheckResult:
    """The same decoders against plain float32 ones: dense weights, composed rope and attention."""
    plain = replace(
        device,
        compute_dtype="float32",
        fused_rope=False,
        fused_attention=False,
        attention_tile_rows=1 << 20,
    )
    errors = {}
    for variant, each, bits in _variants(device):
        decoder = tiny_decoder(each, bits=bits)
        reference = tiny_decoder(plain, bits=bits, dequantised=True)
        ids = _random_ids(decoder.config.vocab_size, 100)
        error = relative_error(one_shot(decoder, each, ids), one_shot(reference, plain, ids))
        errors[variant] = (error, _TOLERANCE[each.compute_dtype])
    return error_check("logits equal plain float32", errors)


def check_model(device: DeviceProfile, path: pathlib.Path, name: str) -> CheckResult:
    """A real model: packed steps against one-shot."""
    error = packed_error(open_decoder(path, device), device)
    errors = {str(device.compute_dtype): (error, _TOLERANCE[device.compute_dtype])}
    return error_check(f"{name}: packed steps equal one-shot", errors)


def _variants(device: DeviceProfile) -> Iterator[tuple[str, DeviceProfile, int | None]]:
    """(label, device, bits) of every kind of decoder that this device runs."""
    for each in dict.fromkeys((device, replace(device, compute_dtype="float32"))):
        yield each.compute_dtype, each, None
        if device.keeps_quantised:
            yield f"{each.compute_dtype} 4-bit", each, 4


def packed_error(decoder: Decoder, device: DeviceProfile) -> float:
    """Largest error of any row's logits when sessions share steps, against each alone at once."""
    lengths = [sum(chunks) + _NUM_DECODED for chunks in _CHUNKS]
    texts = [_random_ids(decoder.config.vocab_size, n, seed=i) for i, n in enumerate(lengths)]
    wanted = [one_shot(decoder, device, ids) for ids in texts]
    stepper = Stepper(decoder, device, lengths)
    done, errors = [0] * len(texts), []
    for turn in range(max(map(len, _CHUNKS)) + _NUM_DECODED):
        work = []
        for index, ids in enumerate(texts):
            chunks = _CHUNKS[index]
            size = chunks[turn] if turn < len(chunks) else 1
            if chunk := ids[done[index] : done[index] + size]:
                work.append((index, chunk))
        for (index, chunk), got in zip(work, stepper.step(work), strict=True):
            rows = wanted[index][done[index] : done[index] + len(chunk)]
            errors.append(relative_error(got, rows))
            done[index] += len(chunk)
    assert done == lengths
    return float(np.max(errors))  # NaN if any is


def one_shot(decoder: Decoder, device: DeviceProfile, ids: list[int]) -> mx.array:
    """Logits `(T, vocab)` f32 of a text in one step."""
    return Stepper(decoder, device, [len(ids)]).step([(0, ids)])[0]


class Stepper:
    """A decoder and the KV of a few sessions of at most so many tokens."""

    def __init__(self, decoder: Decoder, device: DeviceProfile, lengths: Sequence[int]) -> None:
        self._decoder = decoder
        layout = kv_layout(decoder.config, device)
        capacities = [layout.capacity_for(length) for length in lengths]
        num_bytes = sum(map(layout.capacity_bytes, capacities))
        pool = KVPool(layout, getattr(mx, device.compute_dtype), num_bytes)
        self._sessions = [SessionKV() for _ in lengths]
        for session, capacity in zip(self._sessions, capacities, strict=True):
            session.buffers = pool.allocate(capacity)

    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[mx.array]:
        """Logits `(rows, vocab)` f32 of one packed step: sessions' indices and next tokens."""
        sessions = [self._sessions[index] for index, _ in work]
        views = [StagedView(kv, kv.num_tokens) for kv in sessions]
        segments = [Segment(v, len(ids)) for v, (_, ids) in zip(views, work, strict=True)]
        packed = mx.array([token for _, ids in work for token in ids], dtype=mx.uint32)
        batch = PackedBatch(segments, packed)
        hidden = self._decoder.run_layers(self._decoder.embed(packed), batch)
        logits = self._decoder.logits(hidden).astype(mx.float32)
        mx.eval(logits, *[array for view in views for array in view.commit()])
        for kv, (_, ids) in zip(sessions, work, strict=True):
            kv.append(ids)
        ends = list(itertools.accumulate(len(ids) for _, ids in work))
        return [logits[a:b] for a, b in itertools.pairwise([0, *ends])]


def _random_ids(vocab_size: int, num_tokens: int, *, seed: int = 0) -> list[int]:
    ids = np.random.default_rng(seed).integers(0, vocab_size, num_tokens)
    return [int(token) for token in ids]
