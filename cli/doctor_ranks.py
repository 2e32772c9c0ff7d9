"""`edgekv doctor --hosts`: what a model gains and loses on several ranks."""

import json
import tempfile
from typing import Any

from edgekv.cli.progress import say
from edgekv.cli.render import one_line, size
from edgekv.errors import EngineFailed
from edgekv.ranks.hosts import Machines
from edgekv.ranks.launcher import Remote, launch

Facts = dict[str, Any]
_MODULE = "edgekv.bench.selftest.ranks"


def measured(these: Machines, model: str | None, remote: Remote, first_port: int | None) -> Facts:
    """What the ranks measure of each other, and of their parts of a model.

    Raises:
        ConfigError: The first host is not this machine, or ranks cannot be started.
        EngineFailed: They could not measure; they have said why.
    """
    argv = ["-m", _MODULE, json.dumps({"model": model})]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        status = launch(
            these,
            argv,
            lambda line: say(one_line(line)),
            remote=remote,
            first_port=first_port,
            stdout=file,
        )
        if status:
            raise EngineFailed(f"the ranks could not be measured: rank 0 ended with {status}")
        file.seek(0)
        facts: Facts = json.load(file)
    return facts


def rank_lines(facts: Facts) -> list[tuple[str, str]]:
    """Label and text of each line for a person."""
    hosts = ", ".join(facts["hosts"])
    lines = [("ranks", f"{len(facts['hosts'])} ({hosts}), {facts['backend']}")]
    lines += [("all_sum", _sum_line(one)) for one in facts["sums"]]
    shape = facts["shape"]
    what = f"{shape['name']} ({shape['num_layers']} layers, {shape['hidden_size']} wide)"
    lines.append(
        (
            "a token",
            f"{what}: {facts['num_collectives']} collectives wait at least "
            f"{_ms(facts['decode_waits_s'])} in all",
        )
    )
    lines.append(
        ("prefill", f"a chunk of {facts['prefill_rows']} rows: {_ms(facts['prefill_waits_s'])}")
    )
    rate = f"{facts['tokens_per_s']:.1f} tokens/s"
    if facts["step_s"] is None:
        lines.append(("at most", f"{rate}, if nothing had to be computed; -m MODEL measures that"))
    else:
        steps = (
            f"a step of all parts takes {_ms(facts['step_s'])}, of a part {_ms(facts['part_s'])}"
        )
        lines.append(("predicted", f"{rate} of one session: {steps}"))
    return lines


def _sum_line(one: Facts) -> str:
    rate = one["bytes"] / one["median_s"] / 1e9
    rows = f"{one['rows']:>3} row{'s' if one['rows'] > 1 else ' '}"
    times = f"median {_ms(one['median_s'])}, worst {_ms(one['worst_s'])}"
    return f"{rows} of {size(one['bytes'] // one['rows'])}: {times}, {rate:.2f} GB/s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
