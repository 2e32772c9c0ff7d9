"""How sure is sure enough: thresholds from a calibration, and from what happened since."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kv.provenance import ProvenanceMap
from edgekv.predict.gate import Gate, certainty


def gate_of(*critical, num_answers=99, **since):
    return Gate(num_answers=num_answers, critical=(tuple(sorted(critical)),), **since)


def test_the_least_certainty_that_keeps_the_promise():
    gate = gate_of(0.1, 0.2, 0.3, 0.9)
    # One of a hundred is always reckoned with.
    assert gate.threshold(0.005, 0) == math.inf
    for allowed, shown in ((0.01, 0.91), (0.02, 0.31), (0.03, 0.21), (0.04, 0.11)):
        threshold = gate.threshold(allowed, 0)
        assert shown - 0.011 < threshold < shown
        assert gate.share_corrected(threshold, 0) <= allowed + 1e-9
    assert gate.threshold(0.06, 0) == 0.0


def test_who_was_never_calibrated_shows_nothing():
    assert Gate().threshold(1.0, 0) == math.inf
    assert Gate().after(threshold=math.inf, num_places=0, corrected=True) == Gate()


margins = st.lists(st.floats(0, 10), max_size=40)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(margins, st.floats(0, 1), st.integers(0, 10), st.floats(0, 20), st.floats(0, 20))
def test_no_threshold_below_would_keep_it(critical, allowed, others, corrected, foretold):
    gate = gate_of(
        *critical, num_answers=len(critical) + others, corrected=corrected, foretold=foretold
    )
    threshold = gate.threshold(allowed, 0)
    if math.isinf(threshold):
        assert not gate.num_answers or gate.factor / (gate.num_answers + 1) > allowed - 1e-9
        return
    assert gate.factor * gate.share_corrected(threshold, 0) <= allowed + 1e-9
    if threshold > 0:
        below = math.nextafter(threshold, 0)
        assert gate.factor * gate.share_corrected(below, 0) > allowed - 1e-9


@pytest.mark.parametrize("times", [0.2, 1.0, 4.0])
def test_what_happens_is_learned(times):
    """Where answers go wrong `times` as often as in the calibration, the promise still holds."""
    dice = random.Random(1)
    calibrated = [dice.expovariate(4.0) for _ in range(180)]
    gate = gate_of(*calibrated, num_answers=200)
    corrected = 0
    for number in range(1500):
        threshold = gate.threshold(0.05, 0)
        goes_wrong = times * gate.share_corrected(threshold, 0)
        is_corrected = not math.isinf(threshold) and dice.random() < goes_wrong
        corrected += is_corrected and number >= 300
        gate = gate.after(threshold=threshold, num_places=0, corrected=is_corrected)
    assert corrected <= 1.4 * 0.05 * 1200
    assert 0.5 * times < gate.factor < 2 * times + 0.3
    if times < 1:
        assert gate.threshold(0.05, 0) < gate_of(*calibrated, num_answers=200).threshold(0.05, 0)


def test_who_is_asked_again_needs_to_be_surer():
    """The oftener an answer is asked, the oftener it can go wrong."""
    gate = Gate(num_answers=99, critical=((0.5, 1.0), (0.7, 2.0, 3.0)))
    assert [gate.threshold(0.02, num) for num in (0, 1)] == pytest.approx([0.5, 2.0])
    assert [gate.share_corrected(0.9, num) for num in (0, 1)] == [0.02, 0.03]
    learned = gate.after(threshold=0.9, num_places=1, corrected=True)
    assert learned.experience == [1.0, 0.03]


def test_a_margin_counts_by_what_it_relies_on():
    provenance, weights = ProvenanceMap(), np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    provenance.mark(0, 6, "exact")
    for spans, relied in (([], 0.0), ([(1, 2)], 0.2), ([(3, 5)], 0.35), ([(0, 1)], 0.85)):
        for span in spans:
            provenance.mark(*span, "predicted")
        assert certainty(1.3, weights, provenance) == pytest.approx(1.3 / (relied + 0.03))
    # As if what is in front were exact, and some of the rest computed.
    assert certainty(1.3, weights, provenance, 3, [(0, 4)]) == pytest.approx(1.3 / (0.05 + 0.03))
    assert certainty(1.3, weights, provenance, 0, [(1, 9)]) == pytest.approx(1.3 / (0.5 + 0.03))
    provenance.mark(1, 5, "computed")  # over predicted KV: not counted
    assert certainty(1.3, weights, provenance) == pytest.approx(1.3 / 0.53)
