"""Figures, errors and other people's words as text that a terminal may show. Pure.

A model's answer, a file name or a server's message may hold escape sequences that move the cursor,
change the title or write to the clipboard. Whole sequences are dropped, not only their first byte,
so that no `[31m` is left behind. By hand, because the libraries that do it want the whole text, and
an answer comes in pieces. Pipes get the text as it is.
"""

import re

from edgekv.config import Sampling, SamplingParams
from edgekv.metrics import Stats

# ECMA-48, section 5.4: a sequence that has no end yet, of each kind.
_STRING = r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x1b\n\a\x9c]*"  # runs until BEL or ST
_CSI = r"(?:\x1b\[|\x9b)[ -?]*"
_ESCAPE = r"\x1b[ -/]*"
_UNFINISHED = re.compile(f"{_STRING}|{_CSI}|{_ESCAPE}")
_UNSAFE = re.compile(
    rf"{_STRING}[\a\x9c]?|{_CSI}[^ -?\x1b\n]?|{_ESCAPE}[^ -/\x1b\n]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class TerminalText:
    """Strips control characters and escape sequences from text that comes in pieces.

    Owned by one caller. Tabs and newlines pass. A newline ends every unfinished sequence, so a
    lone opener cannot swallow the rest of an answer.
    """

    def __init__(self) -> None:
        self._open = ""  # how the sequence begins that is unfinished

    def feed(self, text: str) -> str:
        """The part of `text` that may be shown; an open sequence continues in the next call."""
        text, self._open = self._open + text, ""

        def drop(match: re.Match[str]) -> str:
            if match.end() == len(text) and _UNFINISHED.fullmatch(match[0]):
                self._open = match[0][:2]  # the kind; what else it holds is nobody's concern
            return ""

        return _UNSAFE.sub(drop, text)


def moved(column: int, text: str, width: int) -> tuple[int, int]:
    """How many rows down the cursor of a terminal goes, and to which column, when text is written.

    A column of `width` means that the row is full: what comes next begins another.
    """
    from wcwidth import wcwidth  # here, for `--help` should not wait for it

    rows = 0
    for char in text:
        cells = max(0, wcwidth(char))
        if char == "\n":
            rows, column = rows + 1, 0
        elif char == "\t":
            column = min(width - 1, column + 8 - column % 8)
        elif column + cells > width:
            rows, column = rows + 1, cells
        else:
            column += cells
    return rows, column


def one_line(text: str) -> str:
    """`text` without escape sequences and on one line, for messages."""
    return TerminalText().feed(text.replace("\n", " "))


def error_text(message: str, hint: str) -> str:
    """The one shape of every error: what happened, a blank line, what to do about it."""
    lines = [f"error: {one_line(message)}"]
    if hint:
        lines += ["", f"hint: {one_line(hint)}"]
    return "\n".join(lines)


def stats_line(stats: Stats) -> str:
    """One reply's figures, the first token's time first."""
    ttft = "–" if stats.ttft_ms is None else f"{stats.ttft_ms:.0f} ms"
    certain = ""
    if stats.ttft_confirmed_ms not in (None, stats.ttft_ms):
        certain = f", certain {stats.ttft_confirmed_ms:.0f}"
    parts = [
        f"TTFT {ttft} (queue {stats.queue_ms:.0f}{certain})",
        f"prefill {_prefill(stats)}",
        f"cached {stats.num_cached_tokens}/{stats.num_prompt_tokens}",
    ]
    if stats.num_restored_tokens:
        parts.append(f"restored {stats.num_restored_tokens} ({stats.restore_ms:.0f} ms)")
    if stats.num_preemptions:
        parts.append(f"preempted {stats.num_preemptions}×")
    if stats.num_output_tokens > 1:
        parts += [
            f"{stats.decode_tokens_per_s:.1f} tok/s",
            f"max gap {stats.tbt_max_ms:.0f} ms",
        ]
    parts += [sampling_text(stats.sampling), f"{stats.peak_memory_bytes / 1e9:.1f} GB"]
    return " · ".join(parts)


def sampling_text(sampling: Sampling) -> str:
    """How tokens were chosen."""
    parts = ["greedy"]
    if not sampling.greedy:
        parts = [f"temperature {sampling.temperature:g}"]
        parts += [f"top-k {sampling.top_k}"] if sampling.top_k else []
        parts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        parts += [f"min-p {sampling.min_p:g}"] if sampling.min_p else []
    if sampling.repetition_penalty != 1:
        parts.append(f"repetition penalty {sampling.repetition_penalty:g}")
    if sampling.presence_penalty:
        parts.append(f"presence penalty {sampling.presence_penalty:g}")
    if sampling.frequency_penalty:
        parts.append(f"frequency penalty {sampling.frequency_penalty:g}")
    return ", ".join(parts)


def _prefill(stats: Stats) -> str:
    """Exact, or how much was predicted, and what of the answer came early or what repair says."""
    if stats.prefill_mode == "exact":
        return "exact"
    num_early = stats.num_confirmed_tokens + stats.num_retracted_tokens
    if num_early:
        taken_back = stats.num_retracted_tokens
        text = f"predicted {stats.num_predicted_tokens}, {num_early} tokens early"
        return text + (f", {taken_back} taken back" if taken_back else "")
    text = f"predicted {stats.num_predicted_tokens}"
    if not stats.num_predicted_tokens:
        text = "over what an earlier turn predicted"
    if stats.num_repaired_tokens or stats.repair_agreement is not None:
        text += f", repaired {stats.num_repaired_tokens}"
    if stats.repair_agreement is not None:
        text += f" ({stats.repair_agreement:.0%} as exact)"
    return text


def length_note(stats: Stats, sampling: SamplingParams) -> str:
    """Which limit ended a reply that did not stop by itself."""
    limit = sampling.max_tokens
    if limit is not None and stats.num_output_tokens >= limit:
        return f"(cut after {limit} tokens; a larger --max-tokens allows more)"
    return "(cut: the context is full; /clear starts a new conversation)"


def bar(done: int, total: int, width: int = 24) -> str:
    """`width` characters, of which done/total are filled."""
    filled = min(width, width * done // max(total, 1))
    return "█" * filled + "░" * (width - filled)


def duration(seconds: float) -> str:
    """Seconds as a person reads them, rounded up."""
    whole = int(seconds) + (seconds > int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(num_bytes: int) -> str:
    """Bytes in decimal units, as download pages and disks give them."""
    if num_bytes < 1_000_000:
        return f"{num_bytes / 1e3:.0f} kB"
    if num_bytes < 1_000_000_000:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e9:.1f} GB"


def parameters(count: int) -> str:
    """How many weights a model has, as its name says it."""
    unit, name = (10**9, "B") if count >= 10**9 else (10**6, "M")
    return f"{count / unit:.3g} {name} parameters"
