"""Two processes and one store: the second is told, may look, and never does harm."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_store
from tiny_store import FINGERPRINT, kept, open_store, tokens, verify_all

from edgekv.errors import StoreBusy
from edgekv.store import Store

HOLDER = """
import sys
from pathlib import Path
from tiny_store import kept, open_store, tokens, write
store = open_store(Path(sys.argv[1]))
session = kept(store, "mail", "inbox", tokens(300))
store.set_conversation(session.key, '"theirs"')
print("open", flush=True)
turn = 300
for line in sys.stdin:
    write(store, session.key, tokens(turn + 100), start=turn)
    turn += 100
    print("written", flush=True)
store.close()
"""

pytestmark = pytest.mark.slow


class Holder:
    """A process that has the store open."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(tiny_store.__file__).parent)},
        )
        self._wait_for("open")

    def _wait_for(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == word

    def write(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._wait_for("written")

    def end(self, how: signal.Signals | None = None) -> None:
        if how is not None:
            self.process.send_signal(how)
        self.process.communicate()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path)
    yield holder
    holder.end(signal.SIGKILL)


def test_the_second_is_told(tmp_path: Path, holder: Holder) -> None:
    with pytest.raises(StoreBusy, match=f"process {holder.process.pid}") as caught:
        open_store(tmp_path)
    assert "another store folder" in caught.value.hint
    holder.end()
    with open_store(tmp_path) as store:
        assert [s.num_tokens for s in store.sessions()] == [300]
        verify_all(store)


def test_the_lock_goes_with_its_process(tmp_path: Path, holder: Holder) -> None:
    holder.end(signal.SIGKILL)
    with open_store(tmp_path) as store:
        assert [s.conversation for s in store.sessions()] == ['"theirs"']
        verify_all(store)


def test_the_second_may_look_at_any_time(tmp_path: Path, holder: Holder) -> None:
    for num_tokens in range(300, 800, 100):
        (view,) = Store.open_readonly(tmp_path)
        assert (view.in_use, view.damage) == (True, "")
        (session,) = view.sessions
        assert list(session.token_ids) == tokens(num_tokens)
        assert session.conversation == '"theirs"'
        holder.write()
    holder.end(signal.SIGKILL)
    (view,) = Store.open_readonly(tmp_path)  # the log is still to be taken in
    assert not view.in_use
    assert [s.num_tokens for s in view.sessions] == [800]
    with open_store(tmp_path) as store:
        verify_all(store)


def test_other_models_have_stores_of_their_own(tmp_path: Path, holder: Holder) -> None:
    with open_store(tmp_path, fingerprint=FINGERPRINT[::-1]) as store:
        kept(store, "mail", "inbox", tokens(100, seed=1))
        holder.write()
        verify_all(store)
        views = Store.open_readonly(tmp_path)
        assert sorted(s.num_tokens for view in views for s in view.sessions) == [100, 400]
    holder.end()
    with open_store(tmp_path) as store:
        verify_all(store)
