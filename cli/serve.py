"""`edgekv serve`: the daemon that apps share."""

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.options import DEFAULT_MODEL, MODEL_HELP, Aux, Predictor, fetching
from edgekv.cli.progress import say
from edgekv.config import PredictionOptions, RuntimeConfig, check_choice
from edgekv.errors import ConfigError, StoreBusy

if TYPE_CHECKING:
    from edgekv.runtime import Runtime
    from edgekv.server.daemon import Listening


def serve(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="An address of loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="For apps with a key; 0: a free one.")] = 8642,
    uds: Annotated[
        Path | None, typer.Option(help="Unix socket, without keys (default: in the state folder).")
    ] = None,
    pool_gib: Annotated[
        float | None, typer.Option(help="Hard budget of KV memory (default: the device's).")
    ] = None,
    open_ports: Annotated[
        list[str] | None,
        typer.Option("--open", metavar="PORT=APP", help="A port without a key, of one app."),
    ] = None,
    keep_alive: Annotated[
        float | None,
        typer.Option(help="Unload the model after so many idle seconds (default: never)."),
    ] = None,
    prefill: Annotated[str, typer.Option(help="exact, predict or auto.")] = "exact",
    predictor: Predictor = None,
    aux: Aux = None,
    print_service: Annotated[
        str | None,
        typer.Option(
            metavar="launchd|systemd", help="Print what has the system run this command, and exit."
        ),
    ] = None,
) -> None:
    """Serve a model to every app: OpenAI's, Anthropic's and Ollama's APIs on loopback.

    Apps at the port need a key (edgekv apps add NAME); those at the Unix socket, this user's
    processes, need none.
    """
    if print_service is not None:
        print(_service_file(print_service, sys.argv[1:]), end="")
        return
    config = RuntimeConfig(
        prediction=PredictionOptions(prefill=prefill, predictor=predictor, aux=aux)  # type: ignore[arg-type]
    )
    from edgekv.models.hub import resolve
    from edgekv.runtime import Runtime
    from edgekv.server import daemon

    with fetching(model) as progress:
        resolve(model, progress=progress)

    def make() -> "Runtime":
        runtime = Runtime.open(model, pool_gib=pool_gib, config=config)
        if runtime.keeps_sessions or not config.store.disk_bytes:
            return runtime
        runtime.close()
        raise StoreBusy(
            f"another process has {model} open, so this daemon could keep nothing",
            hint="use the daemon that runs (edgekv ps), or end that process",
        )

    def ready(listening: "Listening") -> None:
        for line in ready_lines(model, listening):
            say(line)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    for noisy in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    options = daemon.DaemonOptions(
        host=host,
        port=port,
        uds=daemon.socket_path() if uds is None else uds,
        open_ports=dict(_open_port(text) for text in open_ports or ()),
        keep_alive_s=keep_alive,
    )
    daemon.serve(model, make, options, ready=ready)


def ready_lines(model: str, listening: "Listening") -> list[str]:
    """Where it listens, what it serves, and how the first client is connected."""
    places = [str(listening.uds)] if listening.uds is not None else []
    places += [f"http://{_authority(*listening.address)}"] if listening.address else []
    places += [f"http://127.0.0.1:{p} (app {a})" for p, a in listening.open_addresses.items()]
    connect = "edgekv chat"
    if listening.address is not None:
        base = f"http://{_authority(*listening.address)}/v1"
        connect = f"OPENAI_BASE_URL={base} and a key, which edgekv apps add NAME makes"
    return [f"listening at {', '.join(places)}", f"serving {model}", f"connect: {connect}"]


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _open_port(text: str) -> tuple[int, str]:
    port, _, app = text.partition("=")
    if not app or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError.of("--open", text, "PORT=APP")
    return int(port), app


def _service_file(kind: str, arguments: list[str]) -> str:
    """A launchd plist, or a systemd user unit, that runs this command."""
    check_choice("--print-service", kind, ("launchd", "systemd"))
    at = next(i for i, word in enumerate(arguments) if word.startswith("--print-service"))
    rest = arguments[at + (1 if "=" in arguments[at] else 2) :]
    words = [sys.executable, "-m", "edgekv.cli.main", *arguments[:at], *rest]
    if kind == "launchd":
        import plistlib

        service = {
            "Label": "dev.edgekv.serve",
            "ProgramArguments": words,
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ProcessType": "Interactive",
        }
        return plistlib.dumps(service).decode()
    command = " ".join(shlex.quote(word).replace("%", "%%") for word in words)
    return (
        "[Unit]\nDescription=edgekv: one local LLM runtime for every app\n\n"
        f"[Service]\nExecStart={command}\nRestart=on-failure\nSuccessExitStatus=143\n"
        "TimeoutStopSec=60\n\n[Install]\nWantedBy=default.target\n"
    )
