"""`edgekv doctor`: what edgekv found on this machine, and whether it computes as it should."""

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekv.cli.doctor_ranks import measured, rank_lines
from edgekv.cli.launch import Backend, Cwd, HostFile, Hosts, Local, Port, Python
from edgekv.cli.options import DEFAULT_MODEL, Aux, Json, fetching
from edgekv.cli.progress import StatusLine
from edgekv.cli.render import one_line, size
from edgekv.errors import ConfigError, DownloadError, EdgeKVError
from edgekv.ranks.hosts import Machines, machines
from edgekv.ranks.launcher import Remote

if TYPE_CHECKING:
    from edgekv.predict.artifact import PredictorInfo

_LABEL_WIDTH = 14

Facts = dict[str, Any]


def doctor(
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Check kernels, memory, speed and disk.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Self-test on this model too (default: the default one, if it is here); with "
            "ranks, measure their parts of it.",
        ),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(help="Check that this KV predictor fits --model; a file or a name."),
    ] = None,
    aux: Aux = None,
    local: Local = None,
    hosts: Hosts = None,
    hostfile: HostFile = None,
    backend: Backend = None,
    port: Port = None,
    python: Python = None,
    cwd: Cwd = None,
    as_json: Json = False,
) -> None:
    """Show versions, device and cache; with --self-test, check that the machine computes right.

    With --local, --hosts or --hostfile, start a rank there each and measure what they cost.

    Exit code 1 if a check fails. Needs neither a model nor the network, but for --predictor.
    """
    these = _machines(local, hosts, hostfile, backend)
    if model is not None and not (self_test or predictor or these):
        raise ConfigError(
            "--model is for checks", hint="add --self-test, or --predictor, or leave it out"
        )
    facts = gather_facts()
    if predictor is not None:
        facts["predictors"] = [_checked(model or DEFAULT_MODEL, predictor, aux)]
    if not as_json:
        _print(fact_lines(facts))
    if self_test:
        facts["checks"] = _run_self_test(facts, model, show=not as_json)
    if these is not None:
        facts["ranks"] = measured(these, model, Remote(python=python, cwd=cwd), port)
        if not as_json:
            _print(rank_lines(facts["ranks"]))
    if as_json:
        print(json.dumps(facts))
    if any(result["status"] == "fail" for result in facts.get("checks", ())):
        raise typer.Exit(1)


def _machines(
    local: int | None, hosts: str | None, hostfile: Path | None, backend: str | None
) -> Machines | None:
    """Where ranks are to be measured, if any are."""
    if all(way is None for way in (local, hosts, hostfile)):
        return None
    return machines(local=local, hosts=hosts, hostfile=hostfile, backend=backend)


def _print(lines: list[tuple[str, str]]) -> None:
    for label, value in lines:
        print(f"{label:<{_LABEL_WIDTH}} {one_line(str(value))}", flush=True)


def gather_facts() -> Facts:
    """Everything that can be known without a self-test, as plain values."""
    from edgekv.bench.report import machine, versions
    from edgekv.device import loading_hint, profile
    from edgekv.models.cache import models_dir

    try:
        device = profile()
    except ImportError as error:
        raise EdgeKVError(f"MLX cannot be loaded: {error}", hint=loading_hint(error)) from error
    from edgekv.models.fingerprint import weights_fingerprint  # these may import MLX
    from edgekv.models.hub import resolve
    from edgekv.predict.shipped import shipped_predictors

    path = ours = None
    with suppress(DownloadError):
        path = resolve(DEFAULT_MODEL, offline=True)
        ours = weights_fingerprint(path)
    return {
        "versions": versions(),
        "machine": machine(),
        "warning": device.warning,
        "cache_dir": str(models_dir()),
        "cache_free_bytes": _free_bytes(models_dir()),
        "default_model": {"name": DEFAULT_MODEL, "path": None if path is None else str(path)},
        "predictors": [
            _predictor(
                one.name, one.info, None if ours is None else ours == one.info.base_fingerprint
            )
            for one in shipped_predictors(DEFAULT_MODEL)
        ],
    }


def _predictor(name: str, info: "PredictorInfo", fits: bool | None) -> Facts:
    """A KV predictor; whether it fits the model is None where there is no model."""
    return {"name": name, "kind": info.kind, "depth": info.depth, "fits": fits}


def _checked(model: str, predictor: str, aux: str | None) -> Facts:
    """A predictor, of which opening it has shown that it fits the model."""
    from edgekv.models.open_model import open_model
    from edgekv.predict.opening import open_predictor
    from edgekv.predict.prune import open_auxiliary
    from edgekv.predict.shipped import find_predictor

    base = open_model(model)
    other = None if aux is None else open_auxiliary(aux, base)
    file = find_predictor(base.name, predictor, base.fingerprint)
    return _predictor(predictor, open_predictor(base, file, other).info, fits=True)


def _free_bytes(folder: Path) -> int:
    """Free space where the folder is or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fact_lines(facts: Facts) -> list[tuple[str, str]]:
    """Label and text of each line for a person."""
    versions, machine, model = facts["versions"], facts["machine"], facts["default_model"]
    weights = "stay quantised" if machine["keeps_quantised"] else "are dequantised on load"
    lines = [
        ("edgekv", versions["edgekv"]),
        ("MLX", versions["mlx"]),
        ("mlx-lm", versions["mlx-lm"] or "not installed (bench --peer needs it)"),
        ("Python", versions["python"]),
        ("system", machine["os"]),
        ("device", f"{machine['backend']}, {machine['name']}, {machine['num_cpus']} CPUs"),
        ("computes in", f"{machine['compute_dtype']}; quantised weights {weights}"),
        ("BLAS", machine["blas"]),
        ("memory", size(machine["memory_bytes"])),
        ("KV pool", f"{size(machine['pool_bytes'])} by default"),
        ("cache", f"{facts['cache_dir']}, {size(facts['cache_free_bytes'])} free"),
        ("default model", model["path"] or f"not downloaded; edgekv pull {model['name']}"),
    ]
    fits = {True: "fits the model", False: "made for another model", None: "not checked"}
    for one in facts["predictors"]:
        of = "the model's" if one["kind"] == "self" else "an auxiliary model's"
        what = f"from {of} first {one['depth']} layers, {fits[one['fits']]}"
        lines.append(("KV predictor", f"{one['name']}: {what}"))
    if facts["warning"]:
        lines.append(("warning", facts["warning"].removeprefix("warning: ")))
    return lines


def _run_self_test(facts: Facts, model: str | None, *, show: bool) -> list[dict[str, Any]]:
    """Run all checks, each shown as soon as it is done; a bar names the one that runs."""
    from edgekv.bench.selftest.checks import plan_checks, run_check
    from edgekv.device import profile

    checks = plan_checks(profile(), Path(facts["cache_dir"]), _model_to_check(facts, model))
    results = []
    with StatusLine(sys.stderr) as line:
        for number, (name, check) in enumerate(checks, start=1):
            line.draw(f"checking {name} ({number}/{len(checks)})")
            result = run_check(name, check)
            line.clear()
            if show:
                print(one_line(f"{result.status}  {result.name}: {result.detail}"), flush=True)
            results.append(result.to_dict())
    return results


def _model_to_check(facts: Facts, model: str | None) -> tuple[str, Path] | None:
    """The model that was asked for, or the default one where it is already here."""
    if model is None:
        known = facts["default_model"]
        return None if known["path"] is None else (known["name"], Path(known["path"]))
    from edgekv.models.hub import resolve

    with fetching() as progress:
        return model, resolve(model, progress=progress)
