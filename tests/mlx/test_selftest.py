"""The self-test passes on what works, as CPU and as Metal run it, and fails on what does not."""

import itertools
import os
from dataclasses import replace

import mlx.core as mx
import pytest
from tiny_models import tiny_config, write_folder

from edgekv.bench.selftest import checks, kernels, logits, memory, speed, transfer
from edgekv.bench.selftest.checks import CheckResult, error_check, relative_error
from edgekv.device import BLAS_HINT, profile
from edgekv.errors import EngineFailed
from edgekv.kv.view import StagedView
from edgekv.models.rope import Rope, RopeTables

pytestmark = pytest.mark.slow

PLAIN = replace(
    profile(),
    compute_dtype="float32",
    keeps_quantised=False,
    fused_rope=False,
    fused_attention=False,
)
# Metal's profile, on whatever this machine has: 16 bits, quantised, everything fused.
FUSED = replace(
    PLAIN,
    compute_dtype="bfloat16",
    keeps_quantised=True,
    fused_rope=True,
    fused_attention=True,
    attention_tile_rows=1 << 20,
)
COMPUTE = [
    kernels.check_rope,
    kernels.check_attention,
    kernels.check_quantised_matmul,
    logits.check_packed,
    logits.check_reference,
]
MEMORY = [memory.check_recycled_buffers, memory.check_decode_copies_nothing]


@pytest.mark.parametrize("device", [PLAIN, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("check", COMPUTE, ids=lambda check: check.__name__)
def test_what_computes_right_passes(check, device):
    result = check(device)
    assert result.status == "pass", result
    dtypes = {name.split()[0] for name in result.figures}
    assert dtypes == {device.compute_dtype, "float32"}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("check", MEMORY, ids=lambda check: check.__name__)
def test_what_updates_in_place_passes(check, fused):
    result = check(replace(PLAIN, fused_rope=fused, fused_attention=fused))
    assert result.status == "pass", result
    assert result.figures["grown_bytes"] < result.figures["keys_bytes"] / 4


def test_fused_attention_that_sees_the_future_fails(monkeypatch):
    fused = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, k, v, *, scale, **_: fused(q, k, v, scale=scale),
    )
    assert kernels.check_attention(FUSED).status == "fail"


def test_attention_that_pairs_keys_with_other_values_fails(monkeypatch):
    attend = kernels.attend

    def mixed_up(queries, kv, *others):
        return attend(queries, [(keys, mx.roll(values, 1, axis=1)) for keys, values in kv], *others)

    monkeypatch.setattr(kernels, "attend", mixed_up)
    assert kernels.check_attention(PLAIN).status == "fail"


def test_rope_that_takes_one_offset_for_all_rows_fails(monkeypatch):
    tables = Rope.tables

    def first_offset(self, positions):
        return tables(
            self, mx.broadcast_to(positions[:1], positions.shape) if self.fused else positions
        )

    monkeypatch.setattr(Rope, "tables", first_offset)
    assert kernels.check_rope(PLAIN).status == "fail"


def test_quantised_products_that_are_wrong_for_one_row_fail(monkeypatch):
    product = mx.quantized_matmul
    monkeypatch.setattr(
        mx,
        "quantized_matmul",
        lambda x, *a, **k: product(x, *a, **k) * (2.0 if x.shape[0] == 1 else 1.0),
    )
    assert kernels.check_quantised_matmul(PLAIN).status == "fail"


def test_sessions_that_read_each_other_s_kv_fail(monkeypatch):
    read = StagedView.read
    first = {}

    def mixed_up(self, layer, num_tokens):
        mine = read(self, layer, num_tokens)
        if num_tokens == self.offset + 1:
            return first.setdefault((layer, num_tokens), mine)
        return mine

    monkeypatch.setattr(StagedView, "read", mixed_up)
    monkeypatch.setattr(logits, "_CHUNKS", ((9,), (9,)))
    assert logits.check_packed(PLAIN).status == "fail"


def test_decoders_that_round_to_16_bits_unasked_fail(monkeypatch):
    apply = Rope.apply

    def coarse(self, x, tables: RopeTables):
        return apply(self, x.astype(mx.float16), tables).astype(x.dtype) * 1.05

    monkeypatch.setattr(
        Rope, "apply", lambda self, x, t: coarse(self, x, t) if self.fused else apply(self, x, t)
    )
    assert logits.check_reference(replace(PLAIN, fused_rope=True)).status == "fail"


@pytest.mark.parametrize("check", MEMORY, ids=lambda check: check.__name__)
def test_kv_that_is_copied_fails(check, monkeypatch):
    write = StagedView.write
    held = []

    def held_write(self, layer, keys, values):
        # Somebody keeps the array from before, as a forgotten view would.
        held.append(self._buffers.keys[layer])
        del held[:-8]
        write(self, layer, keys, values)

    monkeypatch.setattr(StagedView, "write", held_write)
    assert check(PLAIN).status == "fail"


@pytest.mark.parametrize("device", [PLAIN, FUSED], ids=["plain", "fused"])
def test_kv_that_leaves_and_comes_back_passes(device):
    result = transfer.check_transfer(device)
    assert result.status == "pass", result
    assert all(speed > 0 for speed in result.figures.values())


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_bytes_that_are_not_the_device_s_fail(whose, monkeypatch):
    """An export that is a copy: it goes stale, or what is written there gets lost."""
    token_runs = transfer.token_runs
    exported = {}

    def copied(layout, buffers, start, end):
        is_ours = exported.setdefault("ours", buffers) is buffers
        runs = token_runs(layout, buffers, start, end)
        if is_ours is (whose == "ours"):
            return [memoryview(bytearray(run.nbytes)) for run in runs]
        return runs

    monkeypatch.setattr(transfer, "token_runs", copied)
    assert transfer.check_transfer(PLAIN).status == "fail"


def test_speeds_are_figures(monkeypatch):
    monkeypatch.setattr(speed, "_REPEATS", 1)
    for check in (speed.check_matmul_speed, speed.check_attention_speed):
        result = check(PLAIN)
        assert result.status in ("pass", "warn")  # the machine may be busy
        assert all(value > 0 for value in result.figures.values())


@pytest.mark.parametrize(("blas", "text"), [("reference", BLAS_HINT), ("openblas", "busy")])
def test_a_slow_matmul_is_a_warning_with_a_cure(blas, text, monkeypatch):
    monkeypatch.setattr(speed, "_best_s", lambda build: 60.0)
    result = speed.check_matmul_speed(replace(PLAIN, blas=blas))
    assert result.status == "warn"
    assert text in result.detail


def test_the_disk_is_written_and_read_back(tmp_path):
    folder = tmp_path / "cache" / "models"
    result = speed.check_disk(folder, num_bytes=16 << 20)
    assert result.status == "pass"
    assert set(result.figures) == {"write_gb_per_s", "read_gb_per_s"}
    assert list(folder.iterdir()) == []


def test_a_disk_that_returns_other_bytes_fails(tmp_path, monkeypatch):
    preadv = os.preadv
    calls = itertools.count()

    def flipped(fd, buffers, offset):
        count = preadv(fd, buffers, offset)
        if next(calls) == 1:
            buffers[0][77] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", flipped)
    result = speed.check_disk(tmp_path, num_bytes=16 << 20)
    assert result.status == "fail"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").write_text("")
    planned = dict(checks.plan_checks(PLAIN, tmp_path / "file", None))
    result = checks.run_check("disk", planned["disk"])
    assert result.status == "fail"
    assert "exists" in result.detail.lower() or "directory" in result.detail.lower()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no kernel"), OSError(28, "No space"), EngineFailed("x"), AssertionError("y")],
)
def test_a_check_that_cannot_run_has_failed(error):
    def check():
        raise error

    result = checks.run_check("rope", check)
    assert (result.name, result.status) == ("rope", "fail")
    assert type(error).__name__ in result.detail


def test_the_plan_has_everything_and_the_model_last(tmp_path):
    names = [name for name, _ in checks.plan_checks(PLAIN, tmp_path, None)]
    assert len(names) == len(set(names)) == 11
    with_model = checks.plan_checks(PLAIN, tmp_path, ("tiny", tmp_path))
    assert [name for name, _ in with_model] == [*names, "tiny", "time between tokens"]


def test_the_time_between_tokens_that_is_promised_is_told(tmp_path):
    folder = write_folder(tmp_path / "tiny", tiny_config("llama"))
    result = speed.check_target(folder, "tiny")
    assert result.status == "pass"
    assert result.figures["tbt_target_ms"] >= 100.0
    assert result.figures["gap_ms"] > 0


def test_errors_that_are_not_numbers_fail_and_are_null_in_json():
    result = error_check("x", {"good": (0.0, 1.0), "nan": (float("nan"), 1.0)})
    assert result.status == "fail"
    assert "nan" in result.detail
    assert result.to_dict()["figures"] == {"good": 0.0, "nan": None}


def test_one_wrong_row_of_many_is_seen():
    wanted = mx.random.normal((200, 16), key=mx.random.key(0))
    got = mx.array(wanted)
    got[150] = -got[150]
    assert relative_error(got, wanted) > 0.5
    assert relative_error(wanted, wanted) == 0.0


def test_a_result_is_plain_values():
    result = CheckResult(name="a", status="pass", detail="b", figures={"c": 1.0})
    assert result.to_dict() == {"name": "a", "status": "pass", "detail": "b", "figures": {"c": 1.0}}
