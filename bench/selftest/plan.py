"""The self-test of `edgekv doctor`: whether this machine computes what edgekv relies on.

Everything runs without a model; a real one is checked too where it is at hand.
"""

import pathlib
from collections.abc import Callable

from edgekv.bench.selftest.checks import CheckResult
from edgekv.device import DeviceProfile
from edgekv.errors import EdgeKVError

Check = Callable[[], CheckResult]


def plan_checks(
    device: DeviceProfile, cache_dir: pathlib.Path, model: tuple[str, pathlib.Path] | None
) -> list[tuple[str, Check]]:
    """(what is being checked, how), in the order in which they should run.

    Args:
        device: The profile to check; its fused paths run even where they are not the default.
        cache_dir: Whose disk is measured.
        model: Name and path of a model to check, or None.
    """
    from edgekv.bench.selftest import kernels as check_kernels
    from edgekv.bench.selftest import logits as check_logits
    from edgekv.bench.selftest import memory as check_memory
    from edgekv.bench.selftest import speed as check_speed

    checks: list[tuple[str, Check]] = [
        ("rope", lambda: check_kernels.check_rope(device)),
        ("attention", lambda: check_kernels.check_attention(device)),
        ("quantised matmul", lambda: check_kernels.check_quantised_matmul(device)),
        ("packed steps", lambda: check_logits.check_packed(device)),
        ("float32 reference", lambda: check_logits.check_reference(device)),
        ("recycled buffers", lambda: check_memory.check_recycled_buffers(device)),
        ("decode step", lambda: check_memory.check_decode_copies_nothing(device)),
        ("matmul speed", lambda: check_speed.check_matmul_speed(device)),
        ("attention speed", lambda: check_speed.check_attention_speed(device)),
        ("disk", lambda: check_speed.check_disk(cache_dir)),
    ]
    if model is not None:
        name, path = model
        checks.append((name, lambda: check_logits.check_model(device, path, name)))
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
