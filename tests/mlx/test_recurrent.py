"""Recurrent layers against the definition, token by token, and against mlx-lm's operations.

However rows are cut into steps, whoever they are packed with, outputs and states are the same.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kv.pool import Buffers
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import Keeps, StagedView
from edgekv.models import recurrent
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.config import ConvConfig, DecoderConfig, DeltaConfig, LayerConfig
from edgekv.models.recurrent import ConvWeights, DeltaWeights, GatedDelta, ShortConv

HIDDEN = 24
ATOL = 2e-5
KINDS = ["conv", "delta"]


def config_of(**kinds):
    layer = LayerConfig(num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=8, rope=None, **kinds)
    return DecoderConfig(
        family="test",
        hidden_size=HIDDEN,
        vocab_size=8,
        context_max=1024,
        layers=(layer,),
        norm_eps=1e-6,
        attention_scale=1.0,
    )


class Draw:
    """Random arrays, of which the first so many were drawn from this seed."""

    def __init__(self, seed):
        self._generator = np.random.default_rng(seed)

    def array(self, *shape, scale=1.0):
        return (scale * self._generator.standard_normal(shape)).astype(np.float32)

    def linear(self, rows, columns):
        matrix = mx.array(self.array(columns, rows, scale=columns**-0.5))
        return lambda x: x @ matrix


def make_delta(delta, seed=0):
    draw = Draw(seed)
    width = delta.num_value_heads * delta.value_dim
    weights = DeltaWeights(
        into=draw.linear(delta.conv_dim + width + 2 * delta.num_value_heads, HIDDEN),
        conv=mx.array(draw.array(delta.conv_size, delta.conv_dim, scale=0.5)),
        decay=mx.array(draw.array(delta.num_value_heads)),
        decay_bias=mx.array(draw.array(delta.num_value_heads)),
        norm=mx.array(1.0 + draw.array(delta.value_dim, scale=0.2)),
        out=draw.linear(HIDDEN, width),
    )
    return GatedDelta(config_of(delta=delta), 0, weights)


def make_conv(conv, seed=0):
    draw = Draw(seed)
    bias = mx.array(draw.array(HIDDEN)) if conv.bias else None
    weights = ConvWeights(
        into=draw.linear(3 * HIDDEN, HIDDEN),
        conv=mx.array(draw.array(conv.size, HIDDEN)),
        conv_bias=bias,
        out=draw.linear(HIDDEN, HIDDEN),
    )
    return ShortConv(config_of(conv=conv), 0, weights)


SMALL = DeltaConfig(num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=4, conv_size=4)
MAKE = {
    "conv": lambda: make_conv(ConvConfig(size=3, num_channels=HIDDEN, bias=True)),
    "delta": lambda: make_delta(SMALL),
}


class Sequence:
    """One sequence of a recurrent layer alone: it has no KV, and so no buffers but in name."""

    def __init__(self):
        self.kv = SessionKV()
        self.kv.buffers = Buffers(1 << 20, [], [])  # a view wants to know that they are the same

    def view(self, **keeps):
        return StagedView(self.kv, self.kv.num_tokens, Keeps(**keeps))

    def commit(self, view, num_rows):
        mx.eval(view.commit())
        self.kv.tokens += [0] * num_rows


def step(layer, work, **keeps):
    """One packed step of `(sequence, rows)`; each one's outputs."""
    views = [sequence.view(**keeps) for sequence, _ in work]
    batch = PackedBatch(
        [Segment(view, len(rows)) for view, (_, rows) in zip(views, work, strict=True)]
    )
    out = layer(mx.array(np.concatenate([rows for _, rows in work])), batch, None)
    for view, (sequence, rows) in zip(views, work, strict=True):
        sequence.commit(view, len(rows))
    ends = np.cumsum([len(rows) for _, rows in work])
    return np.split(np.array(out), ends[:-1])


def in_steps(layer, rows, sizes):
    """A text's outputs in steps of these sizes, then what is left; and its last state."""
    sequence, start, outputs = Sequence(), 0, []
    for size in [*sizes, len(rows)]:
        if len(part := rows[start : start + size]):
            outputs += step(layer, [(sequence, part)])
        start += size
    return np.concatenate(outputs), sequence.kv.states.now[0]


def assert_same(one, other):
    np.testing.assert_allclose(np.array(one), np.array(other), rtol=0, atol=ATOL)


def assert_same_state(one, other):
    for ours, theirs in zip(one, other, strict=True):
        assert_same(ours, theirs)


# --- what it computes ---


def delta_by_definition(layer, x):
    """Token by token in numpy, float64: `(T, hidden)` → outputs and the matrices after all."""
    d, w = layer._delta, layer._weights
    projected = np.array(w.into(mx.array(x)), np.float64)
    conv_w, norm = np.array(w.conv, np.float64), np.array(w.norm, np.float64)
    rates, bias = np.exp(np.array(w.decay, np.float64)), np.array(w.decay_bias, np.float64)
    heads, width = d.num_value_heads, d.num_value_heads * d.value_dim
    matrices = np.zeros((heads, d.value_dim, d.key_dim))
    seen = np.zeros((d.conv_size - 1 + len(x), d.conv_dim))
    seen[d.conv_size - 1 :] = projected[:, : d.conv_dim]
    rows = []
    for t, row in enumerate(projected):
        mixed = (seen[t : t + d.conv_size] * conv_w).sum(axis=0)
        mixed = mixed / (1 + np.exp(-mixed))
        size = d.num_key_heads * d.key_dim
        q, k = (mixed[i * size : (i + 1) * size].reshape(-1, d.key_dim) for i in (0, 1))
        q, k = (a / np.sqrt((a * a).sum(axis=-1, keepdims=True) + 1e-6) for a in (q, k))
        q, k = (np.repeat(a, heads // d.num_key_heads, axis=0) for a in (q * d.key_dim**-0.5, k))
        v = mixed[2 * size :].reshape(heads, d.value_dim)
        gate = row[d.conv_dim : d.conv_dim + width].reshape(heads, d.value_dim)
        write, decay = row[d.conv_dim + width :].reshape(2, heads)
        write = 1 / (1 + np.exp(-write))
        matrices *= np.exp(-rates * np.logaddexp(0, decay + bias))[:, None, None]
        missing = write[:, None] * (v - np.einsum("hvk,hk->hv", matrices, k))
        matrices += missing[:, :, None] * k[:, None]
        out = np.einsum("hvk,hk->hv", matrices, q)
        out = out / np.sqrt((out * out).mean(axis=-1, keepdims=True) + layer._eps) * norm
        rows.append((out * gate / (1 + np.exp(-gate))).reshape(-1))
    return np.array(w.out(mx.array(np.array(rows), mx.float32))), matrices


def conv_by_definition(layer, x):
    """Token by token in numpy."""
    w = layer._weights
    projected = np.array(w.into(mx.array(x)), np.float64)
    before, after, value = np.split(projected, 3, axis=-1)
    taps, bias = np.array(w.conv, np.float64), np.array(w.conv_bias, np.float64)
    seen = np.concatenate([np.zeros((len(taps) - 1, HIDDEN)), before * value])
    rows = [(seen[t : t + len(taps)] * taps).sum(axis=0) + bias for t in range(len(x))]
    return np.array(w.out(mx.array(after * np.array(rows), mx.float32))), seen[len(x) :]


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 64, 65, 150])
@pytest.mark.parametrize(
    "delta",
    [
        SMALL,
        DeltaConfig(num_key_heads=1, num_value_heads=1, key_dim=4, value_dim=12, conv_size=2),
        DeltaConfig(num_key_heads=3, num_value_heads=3, key_dim=16, value_dim=16, conv_size=4),
    ],
    ids=["shared keys", "one head", "square"],
)
def test_delta_is_what_its_definition_says(delta, num_tokens):
    layer, rows = make_delta(delta), Draw(1).array(num_tokens, HIDDEN)
    expected, matrices = delta_by_definition(layer, rows)
    out, state = in_steps(layer, rows, [])
    assert expected.std() > 0.1
    assert_same(out, expected)
    assert_same(state[1], matrices)


def test_conv_is_what_its_definition_says():
    layer, rows = MAKE["conv"](), Draw(1).array(20, HIDDEN)
    expected, last = conv_by_definition(layer, rows)
    out, state = in_steps(layer, rows, [])
    assert_same(out, expected)
    assert_same(state[0], last)


@pytest.mark.parametrize("num_tokens", [1, 40, 130])
def test_the_chunked_form_is_mlx_lm_s_recurrence(num_tokens):
    from mlx_lm.models.gated_delta import gated_delta_ops

    draw, heads, dim = Draw(2), 3, 16
    q, k, v = (mx.array(draw.array(2, heads, num_tokens, dim)) for _ in range(3))
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    write = mx.sigmoid(mx.array(draw.array(2, heads, num_tokens)))
    decay = -mx.exp(mx.array(draw.array(2, heads, num_tokens)))
    state = mx.array(draw.array(2, heads, dim, dim))
    by_token = [a.swapaxes(1, 2) for a in (q, k, v, mx.exp(decay), write)]
    expected, last = gated_delta_ops(*by_token, state)
    run = recurrent._delta_step if num_tokens == 1 else recurrent._delta_chunks
    out, ours = run(q, k, v, write, decay, state)
    assert_same(out, expected.swapaxes(1, 2))
    assert_same(ours, last)


def test_fast_decay_overflows_nothing():
    """What decays by e^-20 a token leaves nothing, and no infinity times zero."""
    draw = Draw(3)
    q, k, v = (mx.array(draw.array(1, 1, 64, 8)) for _ in range(3))
    write, decay = mx.ones((1, 1, 64)), mx.full((1, 1, 64), -20.0)
    out, state = recurrent._delta_chunks(q, k, v, write, decay, mx.zeros((1, 1, 8, 8)))
    assert mx.isfinite(out).all()
    assert mx.isfinite(state).all()


# --- however it is cut ---


@pytest.mark.parametrize("kind", KINDS)
@given(
    num_tokens=st.integers(1, 140),
    sizes=st.lists(st.sampled_from([1, 1, 2, 3, 16, 40, 64, 70]), max_size=6),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_steps_give_the_same(kind, num_tokens, sizes):
    layer, rows = MAKE[kind](), Draw(4).array(num_tokens, HIDDEN)
    whole, state = in_steps(layer, rows, [])
    parts, last = in_steps(layer, rows, sizes)
    assert_same(parts, whole)
    assert_same_state(last, state)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_with_others_each_goes_its_own_way(kind):
    layer = MAKE[kind]()
    texts = [Draw(10 + i).array(30, HIDDEN) for i in range(4)]
    alone = [in_steps(layer, text, []) for text in texts]
    packed = [Sequence() for _ in texts]
    ends, outputs = [0] * 4, [[], [], [], []]
    for sizes in ([3, 1, 20, 0], [1, 1, 1, 5], [1, 0, 1, 1], [25, 1, 8, 1], [0, 27, 0, 23]):
        members = [i for i, size in enumerate(sizes) if size]
        work = [(packed[i], texts[i][ends[i] : ends[i] + sizes[i]]) for i in members]
        for i, out in zip(members, step(layer, work), strict=True):
            outputs[i].append(out)
            ends[i] += sizes[i]
    assert ends == [30] * 4
    for i, (expected, state) in enumerate(alone):
        assert_same(np.concatenate(outputs[i]), expected)
        assert_same_state(packed[i].kv.states.now[0], state)


# --- snapshots ---


@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_inside_a_step_are_what_shorter_steps_leave(kind):
    layer, rows = MAKE[kind](), Draw(5).array(50, HIDDEN)
    sequence = Sequence()
    (out,) = step(layer, [(sequence, rows)], positions=(7, 32, 50), pinned=7)
    expected, _ = in_steps(layer, rows, [])
    assert_same(out, expected)
    for position in (7, 32, 50):
        _, state = in_steps(layer, rows[:position], [])
        assert_same_state(sequence.kv.states.kept[position][0], state)
    sequence.kv.provenance.mark(0, 50, "exact")
    assert sequence.kv.truncate(40) == 32
    (out,) = step(layer, [(sequence, rows[32:])])
    assert_same(out, expected[32:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_thrown_away_has_moved_nothing(kind):
    layer, rows = MAKE[kind](), Draw(6).array(9, HIDDEN)
    sequence = Sequence()
    step(layer, [(sequence, rows[:4])])
    before = sequence.kv.states.now[0]
    view = sequence.view(positions=(6,))
    mx.eval(layer(mx.array(rows[4:6]), PackedBatch([Segment(view, 2)]), None))
    assert sequence.kv.states.now[0] is before
    assert not sequence.kv.states.kept
    (out,) = step(layer, [(sequence, rows[4:])])
    expected, _ = in_steps(layer, rows, [])
    assert_same(out, expected[4:])


def test_a_state_holds_no_more_memory_than_it_has():
    """Neither what was stacked with it, nor the rows behind which it is a snapshot."""
    wide = replace(SMALL, num_value_heads=32, num_key_heads=32, key_dim=32, value_dim=32)
    layer = make_delta(wide)
    state_bytes = 4 * (wide.num_value_heads * 32 * 32 + 3 * wide.conv_dim)
    sequences = [Sequence() for _ in range(16)]
    for sequence in sequences:
        step(layer, [(sequence, Draw(7).array(100, HIDDEN))], positions=(50,))
    mx.clear_cache()
    before = mx.get_active_memory()
    step(layer, [(sequence, Draw(8).array(1, HIDDEN)) for sequence in sequences])
    assert abs(mx.get_active_memory() - before) < state_bytes
    del sequences[1:], sequence
    held_bytes = before - mx.get_active_memory()
    assert held_bytes == pytest.approx(15 * 2 * state_bytes, rel=0.05)
