"""Values that several dialects read and write alike."""

import json
from typing import Any

from edgekv.config import SamplingParams
from edgekv.errors import ConfigError
from edgekv.metrics import Stats
from edgekv.server.fields import Fault, Fields, invalid
from edgekv.tokenizer.grammar import Grammar

# What a request's own app may know of it; the process's memory and others' work are not among it.
_FIGURES = (
    *("ttft_ms", "queue_ms", "prefill_ms", "prefill_mode", "num_prompt_tokens"),
    *("num_cached_tokens", "num_restored_tokens", "num_preemptions", "num_output_tokens"),
    *("decode_tokens_per_s", "tbt_p50_ms", "tbt_max_ms"),
)

NO_THINKING = ("none", "minimal")  # efforts that are none


def json_text(value: object, path: str) -> str:
    """A part of a request as JSON again, in one spelling whatever the client's. Raises Fault."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise invalid(path, "JSON of finite numbers that is not nested too deeply") from None


def json_schema(fields: Fields, name: str) -> Grammar:
    """The grammar of a field that must be a JSON schema. Raises Fault."""
    schema, path = fields.raw(name), fields.path(name)
    if not isinstance(schema, dict | bool):
        raise invalid(path, "a JSON schema")
    return Grammar(kind="json_schema", text=json_text(schema, path))


def sampling(**said: Any) -> SamplingParams:
    """How tokens are chosen, by the names of `SamplingParams`. Raises Fault."""
    try:
        return SamplingParams(**said)
    except ConfigError as error:
        raise Fault("invalid", f"{error}; {error.hint}") from error


def call_arguments(text: str) -> dict[str, Any] | None:
    """A call's arguments as an object; None if they are none, as where a limit cut them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def figures(stats: Stats) -> dict[str, Any]:
    """What the `edgekv` object of an answer says of its request."""
    values = stats.to_dict()
    return {**{name: values[name] for name in _FIGURES}, "seed": stats.sampling.seed}
