"""What is measured of a reply and of an app, and how gaps become percentiles."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edgekv.config import Priority, Sampling


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Figures of one reply; times in milliseconds.

    Attributes:
        ttft_ms: Submit to first visible token, queueing included; None if none was seen. That
            token may have been provisional.
        ttft_confirmed_ms: Submit to the first text that was certain.
        queue_ms: Submit to the first step that computed rows of this request.
        prefill_ms: First step of this request to its first token.
        prefill_mode: "exact": every key and value was computed by the base model. "predict":
            some were predicted, for this prompt or for an earlier turn's and not repaired yet. With
            `confirm` the answer is exact all the same, without it is approximate.
        num_prompt_tokens: Tokens of the prompt, cached ones included.
        num_cached_tokens: Prompt tokens whose KV was there already, in the pool or on disk.
        num_restored_tokens: Tokens whose KV was read back from disk, when the request began and
            after preemptions.
        restore_ms: What reading them took, of all threads together.
        num_preemptions: How often the request had to give its memory to another.
        num_output_tokens: Tokens generated, an end-of-sequence token not counted.
        decode_tokens_per_s: (tokens - 1) / (last - first token's time); 0 below two tokens.
        tbt_p50_ms: Median gap between tokens; 0 below two tokens.
        tbt_max_ms: Largest gap between tokens; 0 below two tokens.
        num_predicted_tokens: Prompt tokens whose KV was predicted for this reply.
        num_repaired_tokens: Tokens, generated ones included, whose KV was replaced by exact KV
            before the reply ended.
        repair_agreement: Of the reply's tokens whose exact logits are known by then, the part that
            exact KV would have said too; None if none is known.
        num_confirmed_tokens: Tokens that were sampled over predicted KV, and confirmed by exact KV.
        num_retracted_tokens: Tokens that were, and exact KV said another.
        num_forced_tokens: Tokens that a grammar left no choice of, and so were not sampled.
        num_rows_cut: Rows of the prompt that ended, exactly, at the last layer that makes KV, for
            the layers above read that of layers below (Gemma 4's small models).
        kv_bytes: Memory of its session's KV, and of states, when it ended.
        peak_memory_bytes: Peak of MLX memory in this process so far.
        sampling: How its tokens were chosen: what the caller said, and of the rest what the model's
            makers say. With its seed the same answer can be had again.
    """

    ttft_ms: float | None
    ttft_confirmed_ms: float | None
    queue_ms: float
    prefill_ms: float
    prefill_mode: Literal["exact", "predict"]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_restored_tokens: int
    restore_ms: float
    num_preemptions: int
    num_output_tokens: int
    decode_tokens_per_s: float
    tbt_p50_ms: float
    tbt_max_ms: float
    num_predicted_tokens: int
    num_repaired_tokens: int
    repair_agreement: float | None
    num_confirmed_tokens: int
    num_retracted_tokens: int
    num_forced_tokens: int
    num_rows_cut: int
    kv_bytes: int
    peak_memory_bytes: int
    sampling: Sampling

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class AppUsage:
    """What an app has of a runtime at one moment.

    Attributes:
        num_waiting: Requests by class of which nothing was computed yet, or that gave way.
        num_running: The others that have not ended.
        kv_bytes: KV memory that its sessions own.
        num_open: Sessions that are open.
        num_stored: Named sessions that are stored, open or not.
    """

    num_waiting: Counter[Priority] = field(default_factory=Counter)
    num_running: Counter[Priority] = field(default_factory=Counter)
    kv_bytes: int = 0
    num_open: int = 0
    num_stored: int = 0


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) by linear interpolation; 0 for no values."""
    import numpy as np  # here, for `edgekv --help` should not wait for it

    return float(np.percentile(values, q)) if values else 0.0
