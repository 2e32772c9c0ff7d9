"""Users at random, I/O in any order: every answer is what it would be undisturbed.

One engine, driven by hand, over a real store; `sim_play` says what happens, `sim_world` checks
every byte of KV that a step reads, every answer, and every invariant whenever nothing is under way.
"""

import pytest
from sim_play import Player, script
from sim_world import Options, World

SMALL_DISK_BYTES = 2 << 20
WORLDS = {
    "roomy": Options(),
    "tight": Options(pool_tokens=320),
    "slow disk": Options(pool_tokens=384, io_share=0.0, num_staging=8),
    "quick disk": Options(pool_tokens=384, io_share=0.5, num_staging=2),
    "small disk": Options(pool_tokens=320, disk_bytes=SMALL_DISK_BYTES),
    "no disk to speak of": Options(pool_tokens=320, disk_bytes=500 << 10),
    "short queues": Options(pool_tokens=384, io_share=0.01, queue_max=1, num_staging=8),
    "first come": Options(pool_tokens=384, policy="fcfs"),
    "pinned": Options(pool_tokens=448, pinned_tokens=192, background=True),
    "async": Options(pool_tokens=384, mode="async"),
    "groups": Options(pool_tokens=384, mode="groups"),
    "naive": Options(pool_tokens=384, mode="naive"),
    "off": Options(pool_tokens=384, mode="off"),
    "no staging": Options(pool_tokens=384, num_staging=0),
    "states": Options(pool_tokens=384, model="states"),
    "states, tight": Options(pool_tokens=320, num_staging=2, model="states"),
    "states, slow disk": Options(pool_tokens=384, io_share=0.0, num_staging=8, model="states"),
    "states, small disk": Options(pool_tokens=320, disk_bytes=SMALL_DISK_BYTES, model="states"),
    "states, async": Options(pool_tokens=384, mode="async", model="states"),
    "states, groups": Options(pool_tokens=384, mode="groups", model="states"),
    "states, naive": Options(pool_tokens=384, mode="naive", model="states"),
    "states, off": Options(pool_tokens=384, mode="off", model="states"),
    "latent": Options(pool_tokens=384, model="latent"),
    "windows": Options(pool_tokens=384, model="windows"),
    "windows, tight": Options(pool_tokens=320, num_staging=2, model="windows"),
    "windows, slow disk": Options(pool_tokens=384, io_share=0.0, num_staging=8, model="windows"),
    "windows, small disk": Options(pool_tokens=320, disk_bytes=SMALL_DISK_BYTES, model="windows"),
    "windows, short queues": Options(pool_tokens=384, io_share=0.01, queue_max=1, model="windows"),
    "windows, off": Options(pool_tokens=384, mode="off", model="windows"),
}


def play(folder, options, seed, *, num_ops=60, restless=False):
    world = World(folder, seed=seed, options=options)
    num_named = 2 if restless else 5
    ops = script(seed, num_ops, crashes=True, restless=restless, num_named=num_named)
    Player(world).play(ops)
    world.everything_again()
    world.close_all()
    budget_bytes = world.store.snapshot().budget_bytes if world.store else 0
    peak_bytes = world.store.snapshot().peak_bytes if world.store else 0
    assert peak_bytes <= budget_bytes
    world.close()
    return world


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("kind", WORLDS)
def test_users_at_random(world_folder, kind):
    world = play(world_folder, WORLDS[kind], seed=22)
    moved = world.totals["num_swap_ins"]
    assert moved > 0 or "off" in kind or kind in {"no staging", "no disk to speak of"}
    assert world.totals["num_corrupt"] == 0


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    "kind", ["tight", "slow disk", "short queues", "pinned", "async", "windows, tight"]
)
def test_restless_users(world_folder, kind):
    """Most of what they ask they take back, and most sessions they close they open again."""
    play(world_folder, WORLDS[kind], seed=12, restless=True)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("restless", [False, True])
@pytest.mark.parametrize("kind", WORLDS)
def test_many_users_at_random(world_folder, kind, restless):
    for seed in range(1000, 1060):
        print(f"seed {seed}")  # noqa: T201 - seen when it fails
        play(world_folder / str(seed), WORLDS[kind], seed, restless=restless)


@pytest.mark.slow
@pytest.mark.faults
def test_the_same_seed_is_the_same_play(world_folder):
    first = play(world_folder / "1", WORLDS["tight"], seed=13)
    second = play(world_folder / "2", WORLDS["tight"], seed=13)
    assert first.totals == second.totals
