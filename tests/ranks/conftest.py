"""Groups of ranks whose processes never outlive their test."""

import pytest
from rank_world import Rank, places


@pytest.fixture
def start():
    """Start ranks that do something: `start("stay", size=2)`."""
    ranks = []

    def begin(what, size=2, places=None, **environ):
        begun = [Rank(place, what, **environ) for place in places or _places(size)]
        ranks.extend(begun)
        return begun

    yield begin
    for rank in ranks:
        rank.close()


_places = places
