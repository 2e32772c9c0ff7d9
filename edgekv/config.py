"""What a user may set: frozen, keyword-only, checked once, at the door."""

import contextlib
import itertools
import operator
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from edgekv.errors import ConfigError

T = TypeVar("T")

MIB = 1 << 20
GIB = 1 << 30

Priority = Literal["interactive", "background"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "background")
PolicyName = Literal["fair", "fcfs"]
POLICIES: tuple[PolicyName, ...] = ("fair", "fcfs")
PrefillMode = Literal["exact", "predict", "auto"]
PREFILL_MODES: tuple[PrefillMode, ...] = ("exact", "predict", "auto")
RepairMode = Literal["off", "idle", "eager"]
SwapMode = Literal["off", "async", "reuse"]


def check_int(field: str, value: object, low: int, high: int) -> int:
    """Return `value` if it is an int in [low, high].

    Raises:
        ConfigError: It is not; the message names the field, the value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError.of(field, value, f"a whole number from {low} to {high}")
    return value


def check_float(field: str, value: object, low: float, high: float) -> float:
    """Return `value` as a float if it is a number in [low, high]; see `check_int`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError.of(field, value, f"a number from {low:g} to {high:g}")
    return float(value)


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Accept `value` if it is one of `choices`; see `check_int`."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError.of(field, value, " or ".join(choices))


def check_kind(field: str, value: object, kind: type[T], *, allowed: str = "") -> T:
    """Return `value` if it is of this type; see `check_int`."""
    if not isinstance(value, kind):
        raise ConfigError.of(field, value, allowed or f"of type {kind.__name__}")
    return value


def check_ids(token_ids: Iterable[int], num_max: int, vocab_size: int) -> list[int]:
    """Token ids as plain ints, from any integer type (numpy's too); the first `num_max` of them.

    Raises:
        ConfigError: These are no token ids, or no model of so many tokens knows one of them.
    """
    try:
        tokens = iter(token_ids)
    except TypeError:
        raise ConfigError.of("token_ids", token_ids, "token ids, in a list or so") from None
    ids = []
    for token in itertools.islice(tokens, num_max):
        if not isinstance(token, bool):
            with contextlib.suppress(TypeError):  # what is no integer is refused below, by name
                token = operator.index(token)
        ids.append(check_int("token id", token, 0, vocab_size - 1))
    return ids


def user_path(path: str | Path) -> Path:
    """With the home folder in place of `~`; that of a user who does not exist stays a name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for ~nobody


def names_a_file(path: object) -> bool:
    """Whether the system could have a file of this name: a path that is not empty, without NUL."""
    try:
        return isinstance(path, str | Path) and b"\0" not in os.fsencode(path or "\0")
    except UnicodeEncodeError:
        return False


def _check_stop(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > 16:
        raise ConfigError.of("stop", value, "a list of at most 16 strings")
    for stop in value:
        if not isinstance(stop, str) or not 1 <= len(stop) <= 1024:
            raise ConfigError.of("stop", stop, "a string of 1 to 1024 characters")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen, as far as the caller says.

    What is None is as the model's makers say (`generation_config.json`, or `general.sampling.*` of
    a GGUF file), and where they are silent as in `Sampling`. Who says `temperature=0` gets the
    likeliest token: then the makers are not asked.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this; 1 keeps all, 0 the
            likeliest alone.
        min_p: Drop tokens less likely than this fraction of the likeliest; 0 drops none.
        repetition_penalty: Divide positive and multiply negative logits of tokens that the prompt
            or the answer already holds by this (CTRL, arXiv 1909.05858); 1 does nothing.
        presence_penalty: Take this from the logits of tokens that the answer already holds.
        frequency_penalty: Take this from a token's logit for each time that the answer holds it.
        seed: Same seed, prompt and model give the same text, whatever else runs in the batch.
            None draws one.
        max_tokens: Stop after this many output tokens; None stops at the end of the context.
        stop: Stop before the first of these strings, also when it spans tokens.
        ignore_eos: Do not stop at the model's end-of-sequence tokens.
        logprobs: None, or the number of likeliest alternatives reported beside each token's
            log-probability.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for field, check, low, high in _SAMPLING_RANGES:
            value = getattr(self, field)
            if value is not None:
                check(field, value, low, high)
        check_kind("ignore_eos", self.ignore_eos, bool, allowed="True or False")
        object.__setattr__(self, "stop", _check_stop(self.stop))

    def over(self, makers: "SamplingParams") -> "Sampling":
        """All of it: what is said here, else what the model's makers say, else as in `Sampling`.

        Where nobody says a seed, one is drawn.
        """
        meant = {} if self.temperature == 0 else makers._said
        drawn = {"seed": secrets.randbits(53)}  # which JSON's readers keep in a double
        return Sampling(**drawn | meant | self._said)

    @property
    def _said(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


_SAMPLING_RANGES: tuple[
    tuple[str, Callable[[str, object, Any, Any], object], float, float], ...
] = (
    ("temperature", check_float, 0.0, 100.0),
    ("top_k", check_int, 0, 1 << 30),
    ("top_p", check_float, 0.0, 1.0),
    ("min_p", check_float, 0.0, 1.0),
    ("repetition_penalty", check_float, 0.01, 100.0),
    ("presence_penalty", check_float, -2.0, 2.0),
    ("frequency_penalty", check_float, -2.0, 2.0),
    ("seed", check_int, 0, (1 << 64) - 1),
    ("max_tokens", check_int, 1, 1 << 30),
    ("logprobs", check_int, 0, 100),
)


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingParams):
    """How one request's tokens are chosen, with nothing left open; see `SamplingParams`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where KV lives on SSD, and how much of the volume it may take.

    Attributes:
        folder: Root of all stores; None is what EDGEKV_KV_DIR says, or `kv` in the user's cache
            folder, which EDGEKV_CACHE_DIR moves, as it does for models.
        disk_bytes: Hard budget of all stores under the root together; 0 keeps no KV on disk.
        free_reserve_bytes: What KV leaves free on the volume; what was said is kept all the same.
    """

    folder: Path | None = None
    disk_bytes: int = 8 * GIB
    free_reserve_bytes: int = 4 * GIB

    def __post_init__(self) -> None:
        if self.folder is not None:
            if not names_a_file(self.folder):
                raise ConfigError.of("folder", self.folder, "a path or None")
            object.__setattr__(self, "folder", user_path(self.folder))
        check_int("disk_bytes", self.disk_bytes, 0, 1 << 60)
        check_int("free_reserve_bytes", self.free_reserve_bytes, 0, 1 << 60)


@dataclass(frozen=True, kw_only=True)
class SwapOptions:
    """How KV moves between memory and SSD.

    Attributes:
        mode: "off": preempting forgets, and KV is computed again. "async": everything is written
            at each swap-out, by I/O threads. "reuse": and only what is new, behind the decode.
            The first two exist to be compared with the last.
        group_bytes: Write-behind gathers at least this much before it writes.
        staging_bytes: Memory for KV on its way to disk; counted in the pool's budget.
        num_readers: Threads that restore.
        num_writers: Threads that write.
    """

    mode: SwapMode = "reuse"
    group_bytes: int = 4 * MIB
    staging_bytes: int = 64 * MIB
    num_readers: int = 4
    num_writers: int = 2

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(SwapMode))
        check_int("group_bytes", self.group_bytes, 1 << 12, GIB)
        check_int("staging_bytes", self.staging_bytes, 0, 1 << 40)
        check_int("num_readers", self.num_readers, 1, 64)
        check_int("num_writers", self.num_writers, 1, 64)


@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """Whether KV of prompts is predicted, by what, and what becomes of it (arXiv 2410.08391).

    Attributes:
        prefill: What requests do that say nothing else. "exact": compute all KV. "predict": fill
            the middle of the prompt with predicted KV (with `confirm`, who reads a stream that
            cannot take text back gains nothing by it). "auto": predict where exact prefill would
            miss `ttft_target_ms` and prediction is faster; if answers are confirmed, only for who
            reads a stream that may take text back, and only of prompts so long (some 800 tokens)
            that most answers begin sooner.
        predictor: A file that `edgekv fit` wrote, or the name of one that comes with edgekv;
            None is the first that comes with it for the model, where `prefill` needs one.
        aux: The auxiliary model of a predictor of kind "aux", as the model itself is named.
        sinks: First new tokens of a prompt that are always computed.
        window: Last tokens of a prompt that are always computed, over predicted KV.
        look: Part of what was predicted that is computed after all, before the answer: where the
            prompt's last token looks. With `confirm` three times as much, but only where it may
            let the answer begin. 0 looks only once.
        confirm: What is sampled over predicted KV is provisional until exact KV has said the same
            token; where it says another, the answer goes on from there. So what is kept of it is
            what exact KV says. Without it the answer is approximate.
        corrected_max: With `confirm`: the part of answers, of all, that may be corrected. So sure
            must the model be of what it shows before exact KV has said it. Approximate: by a
            calibration with the defaults of `sinks`, `window` and `look`, and by what was learned
            since.
        repair: "idle": replace predicted KV by exact KV behind the answer, when nobody prefills.
            "eager": before anybody's prefill. "off": not at all; the next
            turn goes on over it, or computes it if that turn asks for "exact".
        ttft_target_ms: See `prefill`; counted from when the request was submitted.
    """

    prefill: PrefillMode = "exact"
    predictor: str | Path | None = None
    aux: str | None = None
    sinks: int = 4
    window: int = 32
    look: float = 0.05  # as `predict.look.SHARE`, for which predictors are calibrated
    confirm: bool = True
    corrected_max: float = 0.03
    repair: RepairMode = "idle"
    ttft_target_ms: float = 500.0

    def __post_init__(self) -> None:
        check_choice("prefill", self.prefill, PREFILL_MODES)
        if self.predictor is not None and not names_a_file(self.predictor):
            raise ConfigError.of("predictor", self.predictor, "a path, a name or None")
        if self.aux is not None and not (isinstance(self.aux, str) and names_a_file(self.aux)):
            raise ConfigError.of("aux", self.aux, "a model or None")
        check_int("sinks", self.sinks, 0, 1 << 16)
        check_int("window", self.window, 1, 1 << 16)
        check_float("look", self.look, 0.0, 1.0)
        check_kind("confirm", self.confirm, bool, allowed="True or False")
        check_float("corrected_max", self.corrected_max, 0.0, 1.0)
        check_choice("repair", self.repair, get_args(RepairMode))
        if self.confirm and self.repair == "off":
            raise ConfigError(
                'repair is "off" and confirm is on: nothing would confirm an answer',
                hint="say confirm=False for approximate answers",
            )
        check_float("ttft_target_ms", self.ttft_target_ms, 0.0, 1e9)

    @property
    def wanted(self) -> bool:
        """Whether a predictor must be loaded."""
        return self.prefill != "exact" or self.predictor is not None


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Limits and targets of one runtime.

    Attributes:
        pool_bytes: Hard budget of the KV pool; None takes the device's default.
        tbt_target_ms: Prefill chunks are sized so that sessions that decode see at most about
            this many milliseconds between tokens. None is what the device can do: 100, or twice
            what a step of their rows alone takes, whichever is more.
        num_sessions_max: Open sessions, all apps together. An app may open another while it has
            no more than are left, so one alone can have half; `Runtime.app` gives it more.
        num_waiting_max: Requests submitted and not finished; the same.
        context_max: Longest session in tokens; None takes the model's.
        chat_template: Which of the model's chat templates writes conversations, by its name; None
            is its default, or the only one.
        policy: "fair" shares service by weight and swaps sessions in turns; "fcfs" serves first
            come, first served, and never preempts to admit.
        swap, store, prediction: See their classes.
    """

    pool_bytes: int | None = None
    tbt_target_ms: float | None = None
    num_sessions_max: int = 4096
    num_waiting_max: int = 1024
    context_max: int | None = None
    chat_template: str | None = None
    policy: PolicyName = "fair"
    swap: SwapOptions = SwapOptions()
    store: StoreOptions = StoreOptions()
    prediction: PredictionOptions = PredictionOptions()

    def __post_init__(self) -> None:
        if self.pool_bytes is not None:
            check_int("pool_bytes", self.pool_bytes, 1 << 14, 1 << 50)
        if self.tbt_target_ms is not None:
            check_float("tbt_target_ms", self.tbt_target_ms, 1.0, 60_000.0)
        check_int("num_sessions_max", self.num_sessions_max, 1, 1 << 20)
        check_int("num_waiting_max", self.num_waiting_max, 1, 1 << 20)
        if self.context_max is not None:
            check_int("context_max", self.context_max, 2, 1 << 24)
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise ConfigError.of("chat_template", self.chat_template, "a name or None")
        check_choice("policy", self.policy, POLICIES)
        check_kind("swap", self.swap, SwapOptions)
        check_kind("store", self.store, StoreOptions)
        check_kind("prediction", self.prediction, PredictionOptions)


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
