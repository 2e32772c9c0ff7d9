import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgekv.bench import plot
from edgekv.errors import ConfigError

PNG = b"\x89PNG\r\n"


@pytest.mark.slow
def test_distributions_are_written(tmp_path):
    target = tmp_path / "tails.png"
    samples = {"ttft_ms": [1.0, 2.0, 30.0], "tbt_ms": []}
    rows = [{"policy": "naive", "samples": samples}, {"policy": "none", "samples": samples}]
    plot.draw_tails(target, "a title", rows, ("policy",))
    assert target.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_lines_are_written(tmp_path):
    target = tmp_path / "lines.png"
    lines = {"resident": [(512, 3.0), (2048, 4.0)], "restart": [(512, None), (2048, 9.0)]}
    panel = plot.Panel(x_name="tokens", y_name="TTFT, ms", lines=lines)
    notes = {"resident": ["one", "two"], "nobody": []}
    plot.draw(target, "a title", [panel, panel, replace(panel, x_log=False, notes=notes)])
    assert target.read_bytes().startswith(PNG)


def test_the_target_is_checked_before_anything_runs(tmp_path):
    plot.check_plot(None)
    plot.check_plot(tmp_path / "new.PNG")
    for target in (tmp_path, tmp_path / "no" / "p.png", tmp_path / "p.pdf", Path("-")):
        with pytest.raises(ConfigError, match="plot is"):
            plot.check_plot(target)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="matplotlib is not installed") as caught:
        plot.check_plot(tmp_path / "p.png")
    assert "edgekv[bench]" in caught.value.hint
