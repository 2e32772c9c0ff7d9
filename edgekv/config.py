"""What a user may set: frozen, keyword-only, checked once, at the door."""

import math
from dataclasses import dataclass
from typing import Literal

from edgekv.errors import ConfigError

GIB = 1 << 30

Priority = Literal["interactive", "background"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "background")


def check_int(field: str, value: object, low: int, high: int) -> int:
    """Return `value` if it is an int in [low, high].

    Raises:
        ConfigError: It is not; the message names the field, the value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError.of(field, value, f"a whole number from {low} to {high}")
    return value


def check_float(field: str, value: object, low: float, high: float) -> float:
    """Return `value` as a float if it is a finite number in [low, high].

    Raises:
        ConfigError: It is not; the message names the field, the value and the range.
    """
    assert math.isfinite(low)
    assert math.isfinite(high)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError.of(field, value, f"a number from {low:g} to {high:g}")
    return float(value)


def check_priority(value: object) -> Priority:
    """Return `value` if it names a priority class.

    Raises:
        ConfigError: It does not.
    """
    for priority in PRIORITIES:
        if value == priority:
            return priority
    raise ConfigError.of("priority", value, " or ".join(PRIORITIES))


def _check_stop(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > 16:
        raise ConfigError.of("stop", value, "a list of at most 16 strings")
    for stop in value:
        if not isinstance(stop, str) or not 1 <= len(stop) <= 1024:
            raise ConfigError.of("stop", stop, "a string of 1 to 1024 characters")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        min_p: Drop tokens less likely than this fraction of the likeliest; 0 drops none.
        repetition_penalty: Divide positive and multiply negative logits of tokens that the prompt
            or the answer already holds by this (CTRL, arXiv 1909.05858); 1 does nothing.
        seed: Same seed, prompt and model give the same text, whatever else runs in the batch.
            None draws one.
        max_tokens: Stop after this many output tokens; None stops at the end of the context.
        stop: Stop before the first of these strings, also when it spans tokens.
        ignore_eos: Do not stop at the model's end-of-sequence tokens.
        logprobs: None, or the number of likeliest alternatives reported beside each token's
            log-probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_float("temperature", self.temperature, 0.0, 100.0)
        check_int("top_k", self.top_k, 0, 1 << 30)
        check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ConfigError.of("top_p", self.top_p, "greater than 0")
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            check_int("seed", self.seed, 0, (1 << 64) - 1)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, 1 << 30)
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, 0, 100)
        object.__setattr__(self, "stop", _check_stop(self.stop))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Limits and targets of one runtime.

    Attributes:
        pool_bytes: Hard budget of the KV pool; None takes the device's default.
        tbt_target_ms: Prefill chunks are sized so that sessions that decode see at most about
            this many milliseconds between tokens.
        num_sessions_max: Open sessions, all apps together.
        num_waiting_max: Requests submitted and not finished, all apps together.
        context_max: Longest session in tokens; None takes the model's.
    """

    pool_bytes: int | None = None
    tbt_target_ms: float = 100.0
    num_sessions_max: int = 4096
    num_waiting_max: int = 1024
    context_max: int | None = None

    def __post_init__(self) -> None:
        if self.pool_bytes is not None:
            check_int("pool_bytes", self.pool_bytes, 1 << 14, 1 << 50)
        check_float("tbt_target_ms", self.tbt_target_ms, 1.0, 60_000.0)
        check_int("num_sessions_max", self.num_sessions_max, 1, 1 << 20)
        check_int("num_waiting_max", self.num_waiting_max, 1, 1 << 20)
        if self.context_max is not None:
            check_int("context_max", self.context_max, 1, 1 << 24)


def pool_bytes_from_gib(pool_gib: float | None) -> int | None:
    """Bytes for a `pool_gib` option; None stays None.

    Raises:
        ConfigError: Not a number in (0, 1048576].
    """
    if pool_gib is None:
        return None
    if check_float("pool_gib", pool_gib, 0.0, 1048576.0) * GIB < 1 << 14:
        raise ConfigError.of("pool_gib", pool_gib, "greater than 0")
    return int(pool_gib * GIB)
