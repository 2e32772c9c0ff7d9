"""How a model's makers mean it to be sampled: `generation_config.json`, or its keys in GGUF.

What they say of one setting is what that setting is where a caller says nothing; how a caller's
words go before theirs says `edgekv.config.SamplingParams`. A value that makes no sense is left out
and told, for it must not keep anybody from a model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from edgekv.config import SamplingParams
from edgekv.errors import ConfigError

SAMPLED = ("temperature", "top_k", "top_p", "min_p")
# What transformers and llama.cpp do and edgekv does not, and the values that ask for nothing.
_FOLDER_UNKNOWN: Mapping[str, tuple[object, ...]] = {
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0, 0.0),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
}
_GGUF_UNKNOWN: Mapping[str, tuple[object, ...]] = {
    "mirostat": (0,),
    "xtc_probability": (0, 0.0),
}
_GGUF_NAMES = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def folder_sampling(values: Mapping[str, object]) -> tuple[SamplingParams, list[str]]:
    """What a generation_config.json says, as transformers reads it, and what is to be told of it.

    Without `do_sample` it means the likeliest token, whatever else is in it; with it a temperature
    of 1. Nothing at all leaves everything open.
    """
    if not values:
        return SamplingParams(), []
    names = (*SAMPLED, "repetition_penalty")
    said = {name: values[name] for name in names if values.get(name) is not None}
    said.setdefault("temperature", 1.0)
    if values.get("do_sample") is not True:
        said["temperature"] = 0.0
    return _checked(said, list(_not_done(values, _FOLDER_UNKNOWN)))


def gguf_sampling(metadata: Mapping[str, object]) -> tuple[SamplingParams, list[str]]:
    """What the keys `general.sampling.*` say, as llama.cpp reads them, and what is to be told.

    A negative temperature is greedy, a `top_k` below 1 keeps all, and a penalty over no tokens
    (`penalty_last_n`) is none. What llama.cpp would penalise in the last 64 tokens is penalised
    wherever it occurred. Converters copy a generation_config.json, in which no temperature is 1.
    """
    prefix = "general.sampling."
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    said = {name: values[key] for name, key in _GGUF_NAMES.items() if key in values}
    for name, value in said.items():
        if isinstance(value, float):  # of 32 bits in the file
            said[name] = float(f"{value:.7g}")
        elif name == "top_k" and isinstance(value, int):
            said[name] = max(value, 0)
    temperature = said.get("temperature")
    if isinstance(temperature, int | float) and temperature < 0:
        said["temperature"] = 0.0
    if values.get("penalty_last_n") == 0:
        said.pop("repetition_penalty", None)
    meant, remarks = _checked(said, list(_not_done(values, _GGUF_UNKNOWN)))
    if "temperature" not in said and any(getattr(meant, name) is not None for name in SAMPLED):
        meant = replace(meant, temperature=1.0)
    return meant, remarks


def _checked(said: dict[str, object], remarks: list[str]) -> tuple[SamplingParams, list[str]]:
    sound: dict[str, object] = {}
    for name, value in said.items():
        try:
            SamplingParams(**{name: value})  # type: ignore[arg-type]  # it checks
        except ConfigError as error:
            remarks.append(f"{error}, which is left out: {error.hint}")
        else:
            sound[name] = value
    return SamplingParams(**sound), remarks  # type: ignore[arg-type]


def _not_done(
    values: Mapping[str, object], unknown: Mapping[str, tuple[object, ...]]
) -> Iterator[str]:
    for name, neutral in unknown.items():
        value = values.get(name)
        if value is not None and value not in neutral:
            yield f"{name} is {repr(value)[:40]}, which edgekv does not do"
