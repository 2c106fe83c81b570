import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
import anact_jax.linen

parser = argparse.ArgumentParser(description="Trains 30 dense layers, at 7 learning rates with 3 seeds each.")
parser.add_argument("word", nargs="?", default="NSwish", choices=("relu", "swish", "NReLU", "NSwish"), help="which")
activation = getattr(anact_jax.linen if (word := parser.parse_args().word)[0] == "N" else nn, word)
rates, seeds, steps = jnp.array([3e-4, 1e-3, 2e-3, 3e-3, 1e-2, 3e-2, 1e-1]), jnp.arange(3), 480
order = jax.random.permutation(jax.random.key(0), 1797)  # 1077 digits to train, 360 to choose the rate, 360 to test
X, y = (jnp.asarray(array)[order] for array in load_digits(return_X_y=True))  # pixels from 0 to 16
class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = (x - 4.9) / 6.0
        for _ in range(30):
            x = nn.Dense(64)(x)
            x = activation(use_running_average=not train)(x) if word[0] == "N" else activation(x)
        return nn.Dense(10)(x)
def fit(rate, seed):
    def loss(params, state, rows):
        logits, state = Net().apply({"params": params, **state}, X[rows], True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean(), state
    def step(carry, key):
        params, state, moments = carry
        gradient, state = jax.grad(loss, has_aux=True)(params, state, jax.random.choice(key, 1077, (128,), False))
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), state, moments), None
    key, optimizer = jax.random.key(seed), optax.sgd(rate, momentum=0.9)
    params = (state := Net().init(key, X, True)).pop("params")
    (params, state, _), _ = jax.lax.scan(step, (params, state, optimizer.init(params)), jax.random.split(key, steps))
    correct = Net().apply({"params": params, **state}, X, False).argmax(-1) == y
    return correct[1077:1437].mean(), correct[1437:].mean()
validation, test = jax.jit(jax.vmap(jax.vmap(fit, (None, 0)), (0, None)))(rates, seeds)
print(f"{word}: validation accuracy", *(f"{a:.3f} at {r:g}" for r, a in zip(rates, validation.mean(1))), sep=" | ")
print(f"{word}: test accuracy {(best := test[validation.mean(1).argmax()]).mean():.3f} +- {best.std(ddof=1):.3f}")
