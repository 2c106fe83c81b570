"""What several test files share.

Independent references in NumPy, float64: activations with derivatives by hand, moments, rules. And a small network
with its data, for tests of the programs.
"""

import functools
import itertools
import math
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    str(path) for path in sorted((ROOT / "experiments").rglob("*.py")) if '__name__ == "__main__"' in path.read_text()
]

_erf = np.vectorize(math.erf)


def _sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def _softplus(x):
    return np.logaddexp(0, x)


def _gelu(x):
    """The tanh form, which is what jax.nn.gelu computes by default."""
    a, b = np.sqrt(2 / np.pi), 0.044715
    t = np.tanh(a * (x + b * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * a * (1 + 3 * b * x**2)


def _mish(x):
    t = np.tanh(_softplus(x))
    return x * t, t + x * (1 - t**2) * _sigmoid(x)


ALPHA, SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

# name -> function of x that returns f(x) and f'(x); at 0 the derivative that JAX takes
VALUE_AND_SLOPE = {
    "relu": lambda x: (np.maximum(x, 0), (x > 0).astype(float)),
    "leaky_relu": lambda x: (np.where(x >= 0, x, 0.01 * x), np.where(x >= 0, 1, 0.01)),
    "elu": lambda x: (np.where(x > 0, x, np.expm1(np.minimum(x, 0))), np.where(x > 0, 1, np.exp(np.minimum(x, 0)))),
    "selu": lambda x: (
        SCALE * np.where(x > 0, x, ALPHA * np.expm1(np.minimum(x, 0))),
        SCALE * np.where(x > 0, 1, ALPHA * np.exp(np.minimum(x, 0))),
    ),
    "tanh": lambda x: (np.tanh(x), 1 - np.tanh(x) ** 2),
    "sigmoid": lambda x: (_sigmoid(x), _sigmoid(x) * (1 - _sigmoid(x))),
    "softplus": lambda x: (_softplus(x), _sigmoid(x)),
    "swish": lambda x: (x * _sigmoid(x), _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))),
    "gelu": _gelu,
    "mish": _mish,
}
VALUE_AND_SLOPE["silu"] = VALUE_AND_SLOPE["swish"]


def stats(name, x, axes=None, mask=None):
    """Moments over `axes` of the elements where mask is set: count, E x, Var x, E f, Var f, E f'^2."""
    x = np.asarray(x, np.float64)
    weight = np.ones_like(x) if mask is None else np.broadcast_to(mask, x.shape).astype(float)
    y, slope = VALUE_AND_SLOPE[name](x)
    count = weight.sum(axes)

    def mean(v):
        return (weight * v).sum(axes) / count

    def variance(v):
        return (weight * (v - (weight * v).sum(axes, keepdims=True) / weight.sum(axes, keepdims=True)) ** 2).sum(
            axes
        ) / count

    return count, mean(x), variance(x), mean(y), variance(y), mean(slope**2)


def gaussian_moments(name, mean=0.0, std=1.0):
    """E f, Var f, E f'^2 under N(mean, std^2), by a fine trapezoid on either side of 0."""
    edges = [min(mean - 12 * std, -1e-6), 0.0, max(mean + 12 * std, 1e-6)]
    total = np.zeros(4)
    for low, high in itertools.pairwise(edges):
        x = np.linspace(low, high, 400_001)
        x[0], x[-1] = np.nextafter(low, high), np.nextafter(high, low)
        density = np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
        y, slope = VALUE_AND_SLOPE[name](x)
        total += [np.trapezoid(density * v, x) for v in (np.ones_like(x), y, y**2, slope**2)]
    mass, first, second, slope_sq = total
    return first / mass, second / mass - (first / mass) ** 2, slope_sq / mass


def standardized(stats, std=0.5, center=True, epsilon=1e-6):
    """Factor and shift of the default form (docs/explanation/method.md), for stats without degenerate values."""
    _, _, _, mean_out, var_out, _ = stats
    shift = mean_out if center else 0.0 * mean_out
    return std / np.sqrt(var_out + (mean_out - shift) ** 2 + epsilon), shift


def published(stats, center=False, epsilon=1e-6):
    """Factor and shift of the paper's rule, likewise."""
    _, _, var_in, mean_out, var_out, slope_sq = stats
    shift = mean_out if center else 0.0 * mean_out
    rho = (var_out + (mean_out - shift) ** 2 + epsilon) / (var_in + epsilon)
    return np.sqrt((1 / rho + 1 / (slope_sq + epsilon)) / 2), shift


def two_classes(n, seed=0):
    """Images whose label says whether they are bright."""
    from experiments.data.sets import Arrays

    images = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 1), np.uint8)
    return Arrays(images, (images.mean((1, 2, 3)) > 127.5).astype(np.int32))


@functools.cache
def small_dataset():
    from experiments.data import Dataset

    parts = two_classes(1024), two_classes(100, seed=1)
    return Dataset(*parts, 2, np.array([127.5]), np.array([74.0]), pad=0, flip=False)


def small_model(activation="nswish", norm="batch", **options):
    from experiments.networks import make_layers
    from experiments.networks.mlp import MLP

    return MLP(make_layers(activation, norm, **options), classes=2, depth=2, width=16)


def small_experiment(**settings):
    from experiments.config import Experiment, changed

    usual = {"epochs": 6, "batch_size": 32, "learning_rate": 0.05}
    return changed(Experiment(), **(usual | settings))
