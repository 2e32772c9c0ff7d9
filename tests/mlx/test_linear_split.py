"""One or two rows times a matrix cut in pieces: the same numbers, the same memory."""

import mlx.core as mx
import numpy as np
import pytest

from edgekv.models.checkpoint import Dense
from edgekv.models.linear import DenseLinear, make_linear
from edgekv.models.split import ROWS_MAX, FewRows, SplitMatrix


def normal(*shape: int) -> mx.array:
    values = np.random.default_rng(len(shape)).standard_normal(shape)
    return mx.array(values.astype(np.float32))


@pytest.fixture(scope="module")
def stream() -> mx.Stream:
    return mx.new_stream(mx.cpu)


@pytest.mark.parametrize("shape", [(3072, 576), (960, 576), (1536, 2048), (49152, 64), (96, 64)])
@pytest.mark.parametrize("num_rows", range(1, ROWS_MAX + 1))
def test_the_product_is_the_same(shape, num_rows, stream):
    weight, x = normal(*shape), normal(num_rows, shape[1])
    split = SplitMatrix.of(weight, stream)
    assert split is not None
    expected = np.array(x) @ np.array(weight).T
    np.testing.assert_allclose(np.array(split(x)), expected, rtol=0, atol=1e-3)


def test_small_matrices_stay_on_one_stream(stream):
    split = SplitMatrix.of(normal(96, 64), stream)
    assert split is not None
    assert len(split.parts) == 1
    large = SplitMatrix.of(normal(3072, 576), stream)
    assert large is not None
    assert len(large.parts) == 2


def test_a_matrix_that_does_not_divide_is_left_whole(stream):
    """Halves of a prime number of rows: only pieces of one row divide them."""
    assert SplitMatrix.of(normal(2 * 1021, 1024), stream) is None


@pytest.mark.parametrize("num_rows", [1, ROWS_MAX, ROWS_MAX + 1, 9])
def test_a_linear_with_bias_is_the_same_at_any_number_of_rows(num_rows, stream):
    weight, bias, x = normal(3072, 576), normal(3072), normal(num_rows, 576)
    plain = make_linear([Dense(weight)], [bias])
    split = make_linear([Dense(weight)], [bias], FewRows(stream=stream))
    assert isinstance(split, DenseLinear)
    assert split.split is not None
    np.testing.assert_allclose(np.array(split(x)), np.array(plain(x)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bias", [None, 1])
def test_a_transposed_linear_is_the_same(bias):
    weight, x = normal(96, 64), normal(5, 64)
    biases = None if bias is None else [normal(96)]
    plain = make_linear([Dense(weight)], biases)
    kept = make_linear([Dense(weight)], biases, FewRows(transposed=True))
    assert isinstance(kept, DenseLinear)
    assert memoryview(kept.matrix).c_contiguous
    np.testing.assert_allclose(np.array(kept(x)), np.array(plain(x)), rtol=0, atol=1e-4)


def test_the_parts_share_the_memory_of_the_whole(stream):
    weight, x = normal(3072, 576), normal(1, 576)
    mx.eval(weight, x)
    split = SplitMatrix.of(weight, stream)
    assert split is not None
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(split(x))
    assert mx.get_peak_memory() - before < weight.nbytes / 20
