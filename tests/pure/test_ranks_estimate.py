"""The arithmetic of several ranks."""

import pytest

from edgekv.ranks.estimate import ORDERS_BYTES, Cost, Shape

TB5 = Cost([(1000, 10e-6), (10_000, 20e-6), (100_000, 110e-6)])


@pytest.mark.parametrize(
    ("num_bytes", "seconds"),
    [
        (1, 10e-6),
        (1000, 10e-6),
        (5500, 15e-6),
        (10_000, 20e-6),
        (55_000, 65e-6),
        (100_000, 110e-6),
        (1_000_000, 1010e-6),  # at the last sizes' bandwidth
    ],
)
def test_a_size_between_two_costs_what_the_line_says(num_bytes, seconds):
    assert TB5.seconds(num_bytes) == pytest.approx(seconds)


def test_one_size_is_all_that_is_known():
    assert Cost([(1000, 1e-5)]).seconds(10**9) == 1e-5


def test_a_step_waits_twice_a_layer_and_for_embedding_logits_and_orders():
    shape = Shape(name="x", num_layers=3, hidden_size=100, vocab_size=5000)
    messages = shape.messages(4, item_bytes=2)
    assert messages == [800] * 7 + [10_000]
    expected = 7 * 10e-6 + 20e-6 + TB5.seconds(ORDERS_BYTES)
    assert TB5.waits_s(messages) == pytest.approx(expected)
