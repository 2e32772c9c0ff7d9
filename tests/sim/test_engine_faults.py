"""The Nth call to the disk fails, for every N: the answers are the same, and it is counted.

The same script is played again and again, with one fault each time. A few N in the ordinary run,
all of them in the long one. What a step reads is compared byte by byte with what must stand there
(`sim_model`), so wrong KV could not hide behind a right answer.
"""

import random
from collections import Counter

import pytest
from faulty_files import Fault, FaultyFiles
from sim_play import Player, script
from sim_world import Options, World

from edgekv.errors import StoreError, StoreFull, StoreUnusable
from edgekv.store.index import Index

SEED = 7
NUM_OPS = 45
MODELS = {
    "KV alone": Options(pool_tokens=384),
    "states": Options(pool_tokens=384, model="states"),
    "windows": Options(pool_tokens=384, model="windows"),
}
FAULTS = (
    ("EIO", "*"),
    ("ENOSPC", "*"),
    ("EINTR", "preadv"),
    ("EINTR", "pwritev"),
    ("short", "preadv"),
    ("short", "pwritev"),
    ("torn", "preadv"),
    ("torn", "pwritev"),
    ("flip", "preadv"),
    ("flip", "pwritev"),
    ("lost", "pwritev"),
)
HARMLESS = {"EINTR", "short"}  # the rest of the transfer follows
FOUND_WHEN_READ = {("flip", "pwritev"), ("lost", "pwritev")}  # which may never happen


@pytest.fixture(params=MODELS)
def options(request):
    return MODELS[request.param]


def play(folder, files, options, *, lives=True):
    world = World(folder, seed=SEED, options=options, files=files)
    Player(world).play(script(SEED, NUM_OPS, lives=lives))
    world.suspend_all()
    world.settle()
    if lives:
        world.restart()
        world.everything_again()
    world.close_all()
    world.close()
    return world


_recorded: dict[str, Counter[str]] = {}


def recorded(folder, options):
    """How often each call is made when nothing fails."""
    if options.model not in _recorded:
        files = FaultyFiles(seed=SEED)
        world = play(folder, files, options)
        assert world.num_events == 0
        assert world.num_restored > 500
        _recorded[options.model] = Counter(files.counts)
    return _recorded[options.model]


def sampled(num_calls, *, few):
    """Some of so many calls, spread over all of them, or, if `few` is 0, all."""
    return [num_calls * (2 * i + 1) // (2 * few) for i in range(few)] or range(1, num_calls + 1)


def fail_at(folder, options, kind, call, nth):
    files = FaultyFiles([Fault(call, nth, kind)], seed=nth)
    world = play(folder, files, options)
    if not files.injected or kind in HARMLESS:
        assert world.num_events == 0
    elif (kind, call) not in FOUND_WHEN_READ:
        assert world.num_events > 0, f"{kind} in {files.injected} passed unseen"
    if (kind, call) == ("flip", "preadv") and files.injected:
        assert world.totals["num_corrupt"] > 0
    return bool(files.injected)


def fail_often(folder, options, kind, call, *, few):
    num_met = 0
    for nth in sampled(recorded(folder / "recorded", options)[call], few=few):
        print(f"{kind} at {call} {nth}")  # noqa: T201 - seen when it fails
        num_met += fail_at(folder / str(nth), options, kind, call, nth)
    assert num_met > 0


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("kind", "call"), FAULTS)
def test_a_call_fails(world_folder, options, kind, call):
    fail_often(world_folder, options, kind, call, few=3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("kind", "call"), FAULTS)
def test_every_call_fails(world_folder, options, kind, call):
    fail_often(world_folder, options, kind, call, few=0)


def die_at(folder, options, kind, nth):
    """From one call on everything fails: sessions go on without a disk."""
    files = FaultyFiles([Fault("*", nth, kind, forever=True)], seed=nth)
    try:
        world = play(folder, files, options, lives=False)
    except StoreError:  # it was dead from the beginning
        assert nth < 10
    else:
        assert world.num_events > 0


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "flip"])
def test_the_disk_dies(world_folder, options, kind):
    for nth in (1, 9, 40, 90):
        die_at(world_folder / str(nth), options, kind, nth)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "flip"])
def test_the_disk_dies_at_every_call(world_folder, options, kind):
    for nth in range(1, 120):
        print(f"{kind} from call {nth}")  # noqa: T201 - seen when it fails
        die_at(world_folder / str(nth), options, kind, nth)


def fail_commit(folder, options, monkeypatch, nth, error):
    """The nth commit fails."""
    apply, count = Index.apply, 0

    def failing(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == nth:
            raise error("injected")
        apply(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "apply", failing)
        world = play(folder, FaultyFiles(seed=SEED), options)
    assert (world.num_events > 0) == (count >= nth)
    return count


def fail_commits(folder, options, monkeypatch, *, step):
    nth, count = 1, 1
    while nth <= count:
        for error in (StoreFull, StoreUnusable):
            print(f"{error.__name__} at commit {nth}")  # noqa: T201 - seen when it fails
            place = folder / f"{nth}-{error.__name__}"
            count = fail_commit(place, options, monkeypatch, nth, error)
        nth += step
    assert nth > 10


@pytest.mark.slow
@pytest.mark.faults
def test_a_commit_fails(world_folder, options, monkeypatch):
    fail_commits(world_folder, options, monkeypatch, step=25)


@pytest.mark.slow
@pytest.mark.long
def test_every_commit_fails(world_folder, options, monkeypatch):
    fail_commits(world_folder, options, monkeypatch, step=1)


def play_on_a_bad_disk(folder, options, seed):
    """Two dozen faults of all kinds, and users, and deaths."""
    draw = random.Random(seed)
    kinds = ["EIO", "ENOSPC", "short", "torn", "flip", "lost"]
    faults = [Fault("*", draw.randrange(1, 400), draw.choice(kinds)) for _ in range(12)]
    faults += [
        Fault(draw.choice(["preadv", "pwritev"]), draw.randrange(1, 60), draw.choice(kinds))
        for _ in range(12)
    ]
    world = World(folder, seed=seed, options=options, files=FaultyFiles(faults, seed=seed))
    Player(world).play(script(seed, 60, crashes=True, restless=bool(seed % 2), num_named=3))
    world.everything_again()
    world.close_all()
    world.close()
    return world.num_events


@pytest.mark.slow
@pytest.mark.faults
def test_a_bad_disk(world_folder, options):
    num_events = 0
    for seed in range(6):
        print(f"seed {seed}")  # noqa: T201 - seen when it fails
        num_events += play_on_a_bad_disk(world_folder / str(seed), options, seed)
    assert num_events > 10


@pytest.mark.slow
@pytest.mark.long
def test_many_bad_disks(world_folder, options):
    for seed in range(4000, 4300):
        print(f"seed {seed}")  # noqa: T201 - seen when it fails
        play_on_a_bad_disk(world_folder / str(seed), options, seed)
