"""What a self-test's check yields."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import mlx.core as mx

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check's outcome.

    Attributes:
        name: What was checked.
        status: "fail" is a wrong result; "warn" is right but slow.
        detail: One line for a person.
        figures: The measured values.
    """

    name: str
    status: Status
    detail: str
    figures: dict[str, float] = field(default_factory=dict)

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
    worst = max(errors, key=lambda variant: _excess(*errors[variant]))
    error, allowed = errors[worst]
    return CheckResult(
        name=name,
        status="pass" if passed else "fail",
        detail=f"error {error:.1e} of {allowed:.1e} allowed ({worst})",
        figures={variant: error for variant, (error, _) in errors.items()},
    )


def _excess(error: float, allowed: float) -> float:
    return math.inf if math.isnan(error) else error / allowed


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


def tolerance_of(dtype: mx.Dtype) -> float:
    """How far two ways of computing the same may differ by rounding alone, see `relative_error`.

    bfloat16 keeps 8 significant bits, and a value passes through dozens of roundings; float32 is
    allowed what fast cosines and reduced-precision matrix units cost on a GPU.
    """
    return 1.5e-1 if dtype == mx.bfloat16 else 2e-3
