"""The examples of docs/, as they stand there, on a tiny model."""

import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from edgekv.chat.values import Completion
from edgekv.runtime.completions import Completions
from edgekv.runtime.session import Session
from edgekv.server.keys import STATE_ENV, AppsFile
from edgekv.tokenizer.grammar import Grammar

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture
def run(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], list[str]]:
    """Runs one; the lines that it prints."""

    def run(name: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, str(tiny_folder)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_each_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in text, path.name


def test_two_apps(run: Callable[[str], list[str]]) -> None:
    said = [line for line in run("two_apps.py") if line.startswith("[")]
    places = [line.split("]")[0].removeprefix("[") for line in said]
    assert sorted(places[:3]) == ["editor/draft", "editor/notes", "mail/inbox"]
    assert places[3] == "editor/notes"


def test_threads(run: Callable[[str], list[str]]) -> None:
    cities = [line.partition(":")[0] for line in run("threads.py")]
    assert [city for city in cities if city in ("Bern", "Lisbon", "Oslo", "Vienna")] == [
        *("Bern", "Lisbon", "Oslo", "Vienna")
    ]


def test_typed_answer(run: Callable[[str], list[str]]) -> None:
    review = run("typed_answer.py")[0]
    assert re.fullmatch(
        r"Review\(mood='(pleased|neutral|angry)', stars=[1-5], will_come_back=(True|False)\)",
        review,
    )


def test_tool_loop(run: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model calls nothing by itself: what it says is forced."""
    call = r'\{"name": "in_stock", "arguments": \{"fruit": "%s"\}\}'
    patterns = iter([call % "pears", r"No pears\.", call % "apples", r"Twelve\."])

    def grammar(self: Completions, asked: Completion, prompt: str) -> Grammar:
        return Grammar(kind="regex", text=next(patterns))

    monkeypatch.setattr(Completions, "_grammar", grammar)
    assert run("tool_loop.py") == [
        "No pears.",
        "",
        '-> in_stock {"fruit": "apples"}Twelve.',
        "     user: Are there any pears?",
        'assistant: in_stock({"fruit": "pears"})',
        "     tool: 0",
        "assistant: No pears.",
        "     user: And apples?",
        'assistant: in_stock({"fruit": "apples"})',
        "     tool: 12",
        "assistant: Twelve.",
    ]


@contextmanager
def daemon(model: Path, folder: Path) -> Iterator[str]:
    """`edgekv serve` at a free port: its address."""
    options = ["-m", str(model), "--port", "0", "--pool-gib", "0.1", "--uds", str(folder / "sock")]
    command = [sys.executable, "-m", "edgekv.cli.main", "serve", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = iter(process.stderr.readline, "")
            listening = next(line for line in said if "listening at" in line)
            yield re.findall(r"http://\S+", listening)[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()


def test_openai_client(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(STATE_ENV, str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", AppsFile().add("example"))
    with daemon(tiny_folder, tmp_path) as address:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        runpy.run_path(str(EXAMPLES / "openai_client.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    cached, asked = map(int, re.findall(r"\d+", last))
    assert 0 < cached < asked


# --- the menu bar ---


def test_menu_bar_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rumps", None)
    with pytest.raises(SystemExit, match="pip install rumps"):
        runpy.run_path(str(EXAMPLES / "menu_bar.py"), run_name="__main__")


class MenuBar:
    """What the sketch uses of rumps' `App`: `run` asks once, and shows what is there then."""

    def __init__(self, title: str, menu: list[str]) -> None:
        self.title = title
        self.menu = {name: SimpleNamespace(title=name) for name in menu}
        self.session: Session

    def run(self) -> None:
        self.ask(None)  # type: ignore[attr-defined]
        while not self.session.messages:
            time.sleep(0.01)
        self.show(None)  # type: ignore[attr-defined]
        print([item.title for item in self.menu.values()], self.title)  # noqa: T201


def test_menu_bar(run: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    rumps = ModuleType("rumps")
    window = SimpleNamespace(run=lambda: SimpleNamespace(clicked=1, text="Hello"))
    timer = SimpleNamespace(start=lambda: None)
    vars(rumps).update(
        App=MenuBar,
        clicked=lambda _: lambda function: function,
        Window=lambda *_, **__: window,
        Timer=lambda *_: timer,
    )
    monkeypatch.setitem(sys.modules, "rumps", rumps)
    (shown,) = run("menu_bar.py")
    assert shown.startswith("['Ask…', '")
    assert not shown.startswith("['Ask…', '–'")
