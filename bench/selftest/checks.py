"""The self-test of `edgekv doctor`: whether this machine computes what edgekv relies on.

Everything runs without a model; a real one is checked too where it is at hand.
"""

import math
import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.errors import EdgeKVError

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check's outcome."""

    name: str  # what was checked
    status: Status  # "fail" is a wrong result; "warn" is right but slow
    detail: str  # one line for a person
    figures: dict[str, float] = field(default_factory=dict)  # the measured values

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no NaN: it becomes null."""
        figures = {k: v if math.isfinite(v) else None for k, v in self.figures.items()}
        return {**asdict(self), "figures": figures}


def error_check(name: str, errors: dict[str, tuple[float, float]]) -> CheckResult:
    """Pass if every error is within its tolerance; NaN is within none.

    Args:
        name: What was checked.
        errors: (error, tolerance) of each variant.
    """
    passed = all(error <= allowed for error, allowed in errors.values())

    def excess(variant: str) -> float:
        error, allowed = errors[variant]
        return math.inf if math.isnan(error) else error / allowed

    worst = max(errors, key=excess)
    error, allowed = errors[worst]
    return CheckResult(
        name=name,
        status="pass" if passed else "fail",
        detail=f"error {error:.1e} of {allowed:.1e} allowed ({worst})",
        figures={variant: error for variant, (error, _) in errors.items()},
    )


def growth_check(name: str, grown_bytes: int, keys_bytes: int) -> CheckResult:
    """Pass if memory did not rise by one layer's keys, which a copy of KV would take at least."""
    return CheckResult(
        name=name,
        status="pass" if grown_bytes < keys_bytes // 2 else "fail",
        detail=f"memory rose by {grown_bytes / 1e6:.2f} MB; "
        f"one layer's keys of one session are {keys_bytes / 1e6:.2f} MB",
        figures={"grown_bytes": grown_bytes, "keys_bytes": keys_bytes},
    )


def relative_error(got: mx.array, wanted: mx.array) -> float:
    """The worst row's RMS error, in units of the RMS of all that was wanted.

    A row from a wrong offset, session or mask gives about 1, however long the rows are.
    """
    got, wanted = got.astype(mx.float32), wanted.astype(mx.float32)
    scale = mx.maximum(mx.sqrt(mx.mean(mx.square(wanted))), 1e-30)
    rows = mx.sqrt(mx.mean(mx.square(got - wanted), axis=-1))
    worst = mx.max(rows / scale).item()
    assert isinstance(worst, float)
    return worst


Check = Callable[[], CheckResult]


def plan_checks(
    device: DeviceProfile, cache_dir: pathlib.Path, model: tuple[str, pathlib.Path] | None
) -> list[tuple[str, Check]]:
    """(what is being checked, how), in the order in which they should run.

    The device's fused paths run even where they are not the default.
    """
    from edgekv.bench.selftest import kernels, logits, memory, speed, transfer

    checks: list[tuple[str, Check]] = [
        ("rope", lambda: kernels.check_rope(device)),
        ("attention", lambda: kernels.check_attention(device)),
        ("quantised matmul", lambda: kernels.check_quantised_matmul(device)),
        ("packed steps", lambda: logits.check_packed(device)),
        ("float32 reference", lambda: logits.check_reference(device)),
        ("recycled buffers", lambda: memory.check_recycled_buffers(device)),
        ("decode step", lambda: memory.check_decode_copies_nothing(device)),
        ("KV as bytes", lambda: transfer.check_transfer(device)),
        ("matmul speed", lambda: speed.check_matmul_speed(device)),
        ("attention speed", lambda: speed.check_attention_speed(device)),
        ("disk", lambda: speed.check_disk(cache_dir)),
    ]
    if model is not None:
        name, path = model
        checks.append((name, lambda: logits.check_model(device, path, name)))
        checks.append(("time between tokens", lambda: speed.check_target(path, name)))
    return checks


def run_check(name: str, check: Check) -> CheckResult:
    """Run one check; one that cannot run has failed."""
    try:
        return check()
    # What MLX raises for a kernel that is missing or does not compile, and what a disk raises; an
    # assertion that fails here is what a self-test is for.
    except (EdgeKVError, RuntimeError, ValueError, OSError, AssertionError) as error:
        detail = f"{type(error).__name__}: {error}"
        return CheckResult(name=name, status="fail", detail=detail)
