import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments.studies.vmapped_training import conv_by_matmul


@pytest.mark.parametrize(
    ("size", "kernel", "strides"),
    [
        ((7, 8), (3, 3), (2, 2)),
        ((6, 5), (1, 1), (2, 2)),
        pytest.param((7, 7), (7, 7), (1, 1), marks=pytest.mark.slow),
    ],
)
def test_convolutions_as_matrix_products_are_the_same(size, kernel, strides):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    conv = nn.Conv(4, kernel, strides)
    variables = conv.init(jax.random.key(1), x)
    found = conv.clone(conv_general_dilated=conv_by_matmul).apply(variables, x)
    np.testing.assert_allclose(found, conv.apply(variables, x), rtol=1e-5, atol=1e-5)
