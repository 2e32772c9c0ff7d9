"""What ranks tell each other before they work together, each a thread."""

import pytest
from threads_group import run_ranks

from edgekv.errors import EngineFailed
from edgekv.ranks.exchange import agree


def tried(digests, failures=("", "")):
    """What comes of it on each rank: the pool's bytes, or an error."""

    def one(group):
        try:
            return agree(group, digests[group.rank], (group.rank + 2) << 40, failures[group.rank])
        except EngineFailed as error:
            return str(error)

    return run_ranks(2, one)


def test_the_least_memory_is_that_of_all():
    assert tried(("a", "a")) == [2 << 40, 2 << 40]


def test_who_has_something_else_is_named():
    first, other = tried(("a", "b"))
    assert first == "rank 1 has something else than rank 0: b is not a"
    assert other == "rank 0 has something else than rank 1: a is not b"


@pytest.mark.parametrize("reason", ["no such file", "/模型" * 4000, "\udcff" * 4000])
def test_a_failure_is_told_however_long_it_is(reason):
    first, other = tried(("a", "a"), ("", reason))
    told = first.removeprefix("rank 1 could not load the model: ")
    assert reason.replace("\udcff", "?").startswith(told)
    assert len(told) > 10
    assert other == 2 << 40
