"""`edgekv launch`: one command on several ranks, of this machine or of several."""

from pathlib import Path
from typing import Annotated

import typer

from edgekv.cli.progress import say
from edgekv.cli.render import one_line
from edgekv.errors import ConfigError
from edgekv.ranks.launched import Launched, launched

Local = Annotated[
    int | None, typer.Option(metavar="N", help="So many ranks on this machine, to try it out.")
]
Hosts = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Addresses, this machine's first; ssh must reach the others."),
]
HostFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Hosts as mlx.distributed_config writes them.")
]
Backend = Annotated[
    str | None,
    typer.Option(help="MLX's way between them: ring or jaccl (default: the hostfile's, or ring)."),
]
Port = Annotated[
    int | None, typer.Option(help="First of the ports that ranks listen at (default: 32323).")
]
Python = Annotated[
    str | None, typer.Option(help="Python of the other machines (default: its path is as here).")
]
Cwd = Annotated[
    str | None, typer.Option(help="Working folder there (default: as here, if it is there).")
]


def launch(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND …", help="What rank 0 runs: chat, serve, …")
    ],
    local: Local = None,
    hosts: Hosts = None,
    hostfile: HostFile = None,
    backend: Backend = None,
    port: Port = None,
    python: Python = None,
    cwd: Cwd = None,
) -> None:
    """Run a command over a model that several machines hold together: launch … -- chat -m MODEL.

    Rank 0 runs here, with this terminal; each other rank computes its part of the same model. Exit
    code: the command's. Nothing between machines is encrypted: use a cable, or a network of your
    own.
    """
    if launched() is not None or command[0] == "launch":
        raise ConfigError("a rank launches no ranks", hint="launch once, with all the hosts")
    from edgekv.ranks.hosts import machines
    from edgekv.ranks.launcher import Remote
    from edgekv.ranks.launcher import launch as run

    these = machines(local=local, hosts=hosts, hostfile=hostfile, backend=backend)
    raise typer.Exit(
        run(
            these,
            ["-m", "edgekv.cli.main", *command],
            lambda line: say(one_line(line)),
            remote=Remote(python=python, cwd=cwd),
            first_port=port,
        )
    )


def follow(mine: Launched) -> int:
    """What a rank other than 0 does, whatever the command: its part of what rank 0 plans."""
    from edgekv.runtime import ranks

    return ranks.follow(mine)
