"""What answers say of themselves, in every API's `edgekv` object."""

from typing import Any

from edgekv.metrics import Stats

_SHOWN = (
    "ttft_ms",
    "queue_ms",
    "prefill_ms",
    "prefill_mode",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_restored_tokens",
    "num_preemptions",
    "num_output_tokens",
    "decode_tokens_per_s",
    "tbt_p50_ms",
    "tbt_max_ms",
)


def shown_stats(stats: Stats) -> dict[str, Any]:
    """The figures of an answer, to a tenth."""
    values = {name: getattr(stats, name) for name in _SHOWN}
    rounded = {n: round(v, 1) if isinstance(v, float) else v for n, v in values.items()}
    return rounded | {"seed": stats.sampling.seed}
