"""`edgekv pull` and `edgekv models`: what is here, and what a model needs before it is."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekv.cli import render
from edgekv.cli.options import DEFAULT_MODEL, MODEL_HELP, Json, fetching, named
from edgekv.config import pool_bytes_from_gib

if TYPE_CHECKING:
    from edgekv.device import DeviceProfile
    from edgekv.models.config import DecoderConfig
    from edgekv.models.examine import Examined

models_app = typer.Typer(
    help="List the models that edgekv knows by name or has fetched.", rich_markup_mode=None
)

_PoolGib = Annotated[
    float | None, typer.Option(help="Of this many GiB of KV memory (default: the device's).")
]
_Model = Annotated[str, typer.Argument(help=MODEL_HELP)]

_LABEL_WIDTH = 10
_SESSION_TOKENS = 8192

Facts = dict[str, Any]


def pull(
    model: _Model = DEFAULT_MODEL,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch all of it again, whatever is here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch a model, or what is missing, damaged or newer of it, and print where it is."""
    from edgekv.models.hub import renew

    with fetching() as progress:
        path = renew(model, progress=progress, force=force)
    print(json.dumps({"model": model, "path": str(path)}) if as_json else path)


@models_app.callback(invoke_without_command=True)
def models(command: typer.Context, as_json: Json = False) -> None:
    """List the models that edgekv knows by name or has fetched."""
    from edgekv.models.hub import list_models
    from edgekv.predict.shipped import shipped_predictors

    if command.invoked_subcommand is not None:
        return
    entries = list_models()
    if as_json:
        rows = [
            {
                **asdict(entry),
                "path": str(entry.path) if entry.path else None,
                "downloaded": entry.downloaded,
                "predictors": [one.name for one in shipped_predictors(entry.name)],
            }
            for entry in entries
        ]
        print(json.dumps({"models": rows}))
        return
    width = max([len(entry.name) for entry in entries], default=0)
    for entry in entries:
        state = entry.path if entry.downloaded else "not downloaded"
        if entry.missing:
            state = f"not all of it: {entry.missing[0]} is missing; edgekv pull {entry.name}"
        names = ", ".join(one.name for one in shipped_predictors(entry.name))
        predictors = f"  (KV predictors: {names})" if names else ""
        print(f"{entry.name:<{width}}  {render.size(entry.size_bytes):>9}  {state}{predictors}")


@models_app.command()
def check(model: _Model, pool_gib: _PoolGib = None, as_json: Json = False) -> None:
    """Say whether a model loads and what it needs, without downloading it.

    Reads configuration and headers only, here or on Hugging Face. Exit code 1 if it does not load.
    """
    _report(model, pool_gib, as_json, offline=False)


@models_app.command()
def show(model: _Model, pool_gib: _PoolGib = None, as_json: Json = False) -> None:
    """Say what a model that is here needs: memory of its weights, and of each session."""
    _report(model, pool_gib, as_json, offline=True)


def _report(model: str, pool_gib: float | None, as_json: bool, *, offline: bool) -> None:
    from edgekv.device import profile
    from edgekv.models.examine import examine_model

    pool_bytes = pool_bytes_from_gib(pool_gib)
    device = profile()
    with fetching(model):
        found = examine_model(model, device, offline=offline)
    facts = {"model": model} | _facts(found, device, pool_bytes or device.pool_bytes)
    if found.refusal is not None:
        facts["hint"] = named(found.refusal.hint, model)
    if as_json:
        print(json.dumps(facts), flush=True)
    else:
        for label, text in _lines(facts):
            print(f"{label:<{_LABEL_WIDTH}} {render.one_line(text)}", flush=True)
    if found.refusal is not None:
        raise typer.Exit(1)


def _facts(found: "Examined", device: "DeviceProfile", pool_bytes: int) -> Facts:
    """What is known, as plain values; what is not is null."""
    refusal, stored, config = found.refusal, found.stored, found.config
    facts: Facts = {
        "loads": refusal is None,
        "reason": str(refusal) if refusal else None,
        "hint": None,
        "family": config.family if config else None,
        "num_layers": config.num_layers if config else None,
        "context_max": config.context_max if config else None,
        "weights": None,
        "memory_bytes": found.memory_bytes,
        "kv": None,
        "pool": None,
        "machine": None,
    }
    if stored is not None:
        facts["weights"] = {
            "num_parameters": sum(one.num_parameters for one in stored.values()),
            "num_bytes": sum(one.num_bytes for one in stored.values()),
            "types": {kind: asdict(one) for kind, one in stored.items()},
        }
    if config is not None:
        facts |= _kv_facts(config, device, pool_bytes)
    if found.memory_bytes is not None:
        needed = found.memory_bytes + pool_bytes + device.freed_bytes_max
        facts["machine"] = {
            "needed_bytes": needed,
            "memory_bytes": device.memory_bytes,
            "fits": needed <= device.memory_bytes,
        }
    return facts


def _kv_facts(config: "DecoderConfig", device: "DeviceProfile", pool_bytes: int) -> Facts:
    from edgekv.models.kv_layout import kv_layout
    from edgekv.runtime.loading import session_tokens_max

    layout = kv_layout(config, device)
    lengths = sorted({min(_SESSION_TOKENS, layout.context_max), layout.context_max})
    sessions = [
        {"num_tokens": n, "num_bytes": layout.capacity_bytes(layout.capacity_for(n))}
        for n in lengths
    ]
    num_tokens = session_tokens_max(layout, pool_bytes)
    kv: Facts = {"token_bytes": layout.token_bytes, "sessions": sessions}
    if layout.window:
        windowed = {"token_bytes": layout.windowed_token_bytes, "num_tokens": layout.window_slots}
        kv["windowed"] = windowed  # of `token_bytes`, and of the last so many tokens
    if layout.state_bytes:
        kv["state_bytes"] = layout.state_bytes  # at one position
    return {
        "kv": kv,
        "pool": {"num_bytes": pool_bytes, "session_tokens_max": num_tokens},
    }


def _lines(facts: Facts) -> Iterator[tuple[str, str]]:
    """Labels and what they say."""
    yield "model", facts["model"]
    yield "loads", "yes" if facts["loads"] else f"no: {facts['reason']}"
    if facts["hint"]:
        yield "hint", facts["hint"]
    if facts["family"]:
        layers, context = facts["num_layers"], facts["context_max"]
        yield "family", f"{facts['family']}: {layers} layers, {context:,} tokens of context"
    if weights := facts["weights"]:
        types = weights["types"].items()
        parts = ", ".join(f"{kind} {render.size(one['num_bytes'])}" for kind, one in types)
        count = render.parameters(weights["num_parameters"])
        yield "weights", f"{count}, {render.size(weights['num_bytes'])} on disk: {parts}"
    if facts["memory_bytes"] is not None:
        yield "in memory", render.size(facts["memory_bytes"])
    if kv := facts["kv"]:
        sizes = [
            f"{render.size(one['num_bytes'])} at {one['num_tokens']:,}" for one in kv["sessions"]
        ]
        yield "KV", f"{_per_token(kv)}; a session {', '.join(sizes)} tokens"
        tokens, pool = facts["pool"]["session_tokens_max"], render.size(facts["pool"]["num_bytes"])
        holds = f"holds a session of {tokens:,} tokens" if tokens > 1 else "holds no session"
        yield "pool", f"{pool}: {holds}"
    if machine := facts["machine"]:
        fits = "fits" if machine["fits"] else "does not fit"
        needed, memory = (render.size(machine[key]) for key in ("needed_bytes", "memory_bytes"))
        yield "machine", f"{fits}: weights and pool need {needed} of {memory}"


def _per_token(kv: Facts) -> str:
    """What a token takes, and a state."""
    text = f"{kv['token_bytes']:,} bytes a token"
    if windowed := kv.get("windowed"):
        text += f", {windowed['token_bytes']:,} of them for the last {windowed['num_tokens']:,}"
    if "state_bytes" in kv:
        text += f", a state {render.size(kv['state_bytes'])}"
    return text
