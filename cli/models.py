"""`edgekv pull` and `edgekv models`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from edgekv.cli import render
from edgekv.cli.options import DEFAULT_MODEL, MODEL_HELP, Json, fetching


def pull(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = DEFAULT_MODEL,
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


def models(as_json: Json = False) -> None:
    """List the models that edgekv knows by name or has fetched."""
    from edgekv.models.hub import list_models
    from edgekv.predict.shipped import shipped_predictors

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
