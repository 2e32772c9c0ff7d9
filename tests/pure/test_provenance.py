"""Ranges of exact and predicted tokens against one word per token."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edgekv.kv.provenance import ProvenanceMap

kinds = st.sampled_from(["exact", "computed", "predicted"])


class ProvenanceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.map = ProvenanceMap()
        self.naive: list[str] = []

    @rule(kind=kinds, length=st.integers(0, 6))
    def append(self, kind, length):
        start = len(self.naive)
        self.map.mark(start, start + length, kind)
        self.naive += [kind] * length

    @rule(kind=kinds, data=st.data())
    def overwrite(self, kind, data):
        start = data.draw(st.integers(0, len(self.naive)))
        end = data.draw(st.integers(start, len(self.naive) + 4))
        self.map.mark(start, end, kind)
        self.naive[start:end] = [kind] * (end - start)

    @rule(num_tokens=st.integers(0, 30))
    def truncate(self, num_tokens):
        self.map.truncate(num_tokens)
        del self.naive[num_tokens:]

    @rule(gap=st.integers(1, 5), length=st.integers(0, 3))
    def a_gap_is_a_bug(self, gap, length):
        start = len(self.naive) + gap
        with pytest.raises(AssertionError):
            self.map.mark(start, start + length, "exact")

    @invariant()
    def equals_its_twin(self):
        assert self.map.num_tokens == len(self.naive)
        spread = [kind for start, end, kind in self.map.ranges for _ in range(start, end)]
        assert spread == self.naive
        exact = next((i for i, k in enumerate(self.naive) if k != "exact"), len(self.naive))
        assert self.map.exact_prefix == exact

    @invariant()
    def ranges_are_the_fewest_possible(self):
        ranges = self.map.ranges
        assert all(start < end for start, end, _ in ranges)
        assert [start for start, _, _ in ranges[1:]] == [end for _, end, _ in ranges[:-1]]
        assert all(a[2] != b[2] for a, b in itertools.pairwise(ranges))
        assert not ranges or ranges[0][0] == 0


ProvenanceMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=20, derandomize=True, deadline=None
)
TestProvenance = pytest.mark.slow(ProvenanceMachine.TestCase)


def test_repair_makes_predicted_kv_exact_from_the_front():
    """sinks exact | prompt predicted | window and answer exact, and repair in between."""
    provenance = ProvenanceMap()
    provenance.mark(0, 4, "exact")
    provenance.mark(4, 100, "predicted")
    provenance.mark(100, 140, "exact")
    assert provenance.exact_prefix == 4
    provenance.mark(4, 50, "exact")
    assert provenance.exact_prefix == 50
    provenance.mark(50, 140, "exact")
    assert provenance.ranges == ((0, 140, "exact"),)


def test_backwards_is_a_bug():
    provenance = ProvenanceMap()
    provenance.mark(0, 10, "exact")
    for start, end in ((5, 4), (-1, 3)):
        with pytest.raises(AssertionError):
            provenance.mark(start, end, "exact")
