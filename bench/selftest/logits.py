"""Checks of whole decoders: what is packed, chunked and decoded equals what is computed at once."""

import pathlib
from dataclasses import replace

import mlx.core as mx
import numpy as np

from edgekv.bench.selftest.checks import CheckResult, error_check, relative_error, tolerance_of
from edgekv.bench.selftest.tiny_decoder import Stepper, TinyShape, tiny_decoder
from edgekv.device import DeviceProfile
from edgekv.models.decoder import Decoder
from edgekv.models.open_model import open_decoder

# Prompt chunks of three sessions: two prefill beside a third that decodes already. Chunk borders
# are odd on purpose.
_CHUNKS = ((20, 17), (31, 42), (9,))
_NUM_DECODED = 4


def check_packed(device: DeviceProfile) -> CheckResult:
    """Tiny decoders as this device runs them: in its dtype and in float32, dense and quantised."""
    errors = {}
    for variant, decoder, dtype in _variants(device):
        errors[variant] = (packed_error(decoder, dtype), tolerance_of(dtype))
    return error_check("packed steps equal one-shot", errors)


def check_reference(device: DeviceProfile) -> CheckResult:
    """The same decoders against plain float32 ones: dense weights, composed rope and attention."""
    composed = replace(device, fused_rope=False, fused_attention=False, attention_tile_rows=1 << 20)
    errors = {}
    for variant, decoder, dtype in _variants(device):
        bits = 4 if "4-bit" in variant else None
        plain = tiny_decoder(TinyShape(), composed, dtype=mx.float32, bits=bits, dequantised=True)
        ids = _random_ids(plain.config.vocab_size, 100)
        error = relative_error(one_shot(decoder, dtype, ids), one_shot(plain, mx.float32, ids))
        errors[variant] = (error, tolerance_of(dtype))
    return error_check("logits equal plain float32", errors)


def check_model(device: DeviceProfile, path: pathlib.Path, name: str) -> CheckResult:
    """A real model: packed steps against one-shot."""
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    decoder = open_decoder(path, device)
    errors: dict[str, tuple[float, float]] = {}
    errors[device.compute_dtype] = (packed_error(decoder, dtype), tolerance_of(dtype))
    return error_check(f"{name}: packed steps equal one-shot", errors)


def _variants(device: DeviceProfile) -> list[tuple[str, Decoder, mx.Dtype]]:
    """(label, decoder, dtype) of every kind of decoder that this device runs."""
    found = []
    for name in dict.fromkeys((device.compute_dtype, "float32")):
        dtype: mx.Dtype = getattr(mx, name)
        for bits in (None, 4) if device.keeps_quantised else (None,):
            decoder = tiny_decoder(TinyShape(), device, dtype=dtype, bits=bits)
            found.append((name if bits is None else f"{name} {bits}-bit", decoder, dtype))
    return found


def packed_error(decoder: Decoder, dtype: mx.Dtype) -> float:
    """Largest error of any row's logits when sessions share steps, against each alone at once."""
    lengths = [sum(chunks) + _NUM_DECODED for chunks in _CHUNKS]
    texts = [_random_ids(decoder.config.vocab_size, n, seed=i) for i, n in enumerate(lengths)]
    wanted = [one_shot(decoder, dtype, ids) for ids in texts]
    stepper = Stepper(decoder, dtype, lengths)
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


def one_shot(decoder: Decoder, dtype: mx.Dtype, ids: list[int]) -> mx.array:
    """Logits `(T, vocab)` f32 of a text in one step."""
    return Stepper(decoder, dtype, [len(ids)]).step([(0, ids)])[0]


def _random_ids(vocab_size: int, num_tokens: int, *, seed: int = 0) -> list[int]:
    ids = np.random.default_rng(seed).integers(0, vocab_size, num_tokens)
    return [int(token) for token in ids]
