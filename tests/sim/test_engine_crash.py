"""The process dies at any call to the disk, or around any commit: what was committed is there.

Death is an exception that nothing of the engine catches; the files as they are at that moment are
copied, and a new engine goes on with the copy. `test_runtime_kill.py` does it with real processes.
"""

from contextlib import suppress
from functools import partial

import pytest
from faulty_files import FaultKind, FaultyFiles
from sim_play import Player, script
from sim_world import Options, World

from edgekv.store.index import Index

SEED = 21
NUM_OPS = 40
MODELS = {
    "KV alone": Options(pool_tokens=384),
    "states": Options(pool_tokens=384, model="states"),
    "windows": Options(pool_tokens=384, model="windows"),
}


@pytest.fixture(params=MODELS)
def options(request):
    return MODELS[request.param]


class Killed(BaseException):
    """Nothing of ours goes on after this."""


class KillingFiles(FaultyFiles):
    """Dies at the nth call from `arm` on, before it happens, or with half of a write done."""

    def __init__(self) -> None:
        super().__init__(seed=SEED)
        self.where = ("", 0)
        self.died = False

    def arm(self, call: str, nth: int) -> None:
        self.where = (call, self.counts[call] + nth)

    def _meet(self, call: str) -> FaultKind | None:
        super()._meet(call)
        counted, nth = self.where
        if self.died or counted not in {call, "*"} or self.counts[counted] != nth:
            return None
        self.died = True
        if call == "pwritev" and nth % 2:
            return "torn"
        raise Killed

    def _unless_torn(self, kind: FaultKind | None, num_bytes: int) -> int:
        if kind == "torn":
            raise Killed
        return num_bytes


def play(world):
    """Play on until the end, through one death."""
    player = Player(world)
    steps = [partial(player.play, [op]) for op in script(SEED, NUM_OPS)]
    steps += [world.everything_again, world.close_all, world.restart, world.everything_again]
    for step in (*steps, world.restart):
        try:
            step()
        except Killed:
            world.crash()
            player.forget()
    with suppress(Killed):
        world.close()
    # Half a record is no record: nobody ever finds it.
    assert world.num_events == 0
    assert world.num_restored > 0


def die_at_call(folder, options, call, nth):
    files = KillingFiles()
    world = World(folder, seed=SEED, options=options, files=files)
    files.arm(call, nth)
    play(world)
    return files.died


def num_calls(folder, options):
    files = KillingFiles()
    play(World(folder, seed=SEED, options=options, files=files))
    return files.counts["*"]


def die_at_commit(folder, options, monkeypatch, nth, *, after):
    world = World(folder, seed=SEED, options=options)
    apply, count = Index.apply, 0

    def killing(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == nth and not after:
            raise Killed
        apply(self, *args, **kwargs)
        if count == nth:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Index, "apply", killing)
        play(world)
    return count >= nth


@pytest.mark.slow
@pytest.mark.faults
def test_killed_at_some_calls(world_folder, options):
    some = (("pwritev", n) for n in (1, 12, 25))
    for call, nth in (*some, ("preadv", 3), ("preadv", 10), ("close", 2), ("unlink", 1)):
        print(f"{call} {nth}")  # noqa: T201 - seen when it fails
        assert die_at_call(world_folder / f"{call}-{nth}", options, call, nth)


@pytest.mark.slow
@pytest.mark.faults
def test_killed_around_some_commits(world_folder, options, monkeypatch):
    for nth in (1, 8, 20, 35):
        for after in (False, True):
            print(f"{'after' if after else 'before'} commit {nth}")  # noqa: T201
            folder = world_folder / f"{nth}-{after}"
            assert die_at_commit(folder, options, monkeypatch, nth, after=after)


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_every_call(world_folder, options):
    for nth in range(1, num_calls(world_folder / "recorded", options)):
        print(f"call {nth}")  # noqa: T201 - seen when it fails
        die_at_call(world_folder / str(nth), options, "*", nth)


@pytest.mark.slow
@pytest.mark.long
def test_killed_around_every_commit(world_folder, options, monkeypatch):
    nth, dies = 1, True
    while dies:
        for after in (False, True):
            print(f"{'after' if after else 'before'} commit {nth}")  # noqa: T201
            place = world_folder / f"{nth}-{after}"
            dies = die_at_commit(place, options, monkeypatch, nth, after=after)
        nth += 1
    assert nth > 30
