import chex
import numpy as np
import pytest

from experiments.data import DATASETS, Split, evaluation_batches, training_batches


@pytest.fixture(scope="module")
def digits():
    return DATASETS["digits"]()


def test_digits_are_whole_disjoint_and_standardized(digits):
    assert (len(digits.train.labels), len(digits.test.labels), digits.classes) == (1437, 360, 10)
    chex.assert_shape(digits.train.images, (1437, 8, 8, 1))
    chex.assert_type([digits.train.images, digits.train.labels], [np.float32, np.int32])
    np.testing.assert_allclose((digits.train.images.mean(), digits.train.images.std()), (0, 1), atol=1e-4)
    assert min(np.bincount(digits.test.labels)) >= 34
    together = np.concatenate([digits.train.images, digits.test.images]).reshape(1797, -1)
    assert len(np.unique(together, axis=0)) == 1797


def test_split_is_the_same_every_time(digits):
    chex.assert_trees_all_equal(DATASETS["digits"](), digits)


def numbered(n):
    return Split(np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1), np.arange(n, dtype=np.int32))


def test_training_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return np.concatenate([batch.labels for batch in training_batches(numbered(50), 8, seed, epoch)])

    np.testing.assert_array_equal(order(0, 3), order(0, 3))
    assert not np.array_equal(order(0, 3), order(0, 4))
    assert not np.array_equal(order(0, 3), order(1, 3))
    assert len(order(0, 0)) == 48
    assert len(set(order(0, 0))) == 48


@pytest.mark.parametrize(("examples", "batch_size"), [(10_000, 192), (360, 64), (8, 8), (3, 8)])
def test_evaluation_sees_every_example_once(examples, batch_size):
    """Partial batches were dropped or counted twice elsewhere (flax#263, #527)."""
    batches = list(evaluation_batches(numbered(examples), batch_size))
    assert all(len(batch.labels) == batch_size for batch in batches)
    seen = np.concatenate([batch.labels[batch.valid] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(examples))
