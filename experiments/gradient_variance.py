"""Variance of the weight gradients by layer, plain activations beside normalized ones.

See `python experiments/gradient_variance.py --help`.
"""

import dataclasses
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, PyTree

from experiments.data import DATASETS, Split
from experiments.models import check_activation, make_layers
from experiments.models.mlp import MLP

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws E[(dL/dW)^2] of every hidden layer of a plain MLP at initialization, on one batch of the digits."""

    activations: tuple[str, ...] = ("relu", "swish", "nrelu", "nswish")
    """names of activations; with n before it, as in nswish, normalized"""
    depth: int = 30
    """hidden layers"""
    width: int = 64
    """units in each"""
    batch_size: int = 256
    """examples in the batch"""
    seeds: int = 5
    """networks to average over (geometric mean)"""
    output: Path = Path("gradient_variance.png")
    """the picture; the numbers go beside it, as JSON"""


def gradient_variance(model: nn.Module, batch: Split, seed: int) -> Float[Array, " depth"]:
    """E[(dL/dW_l)^2] of each hidden layer's kernel at initialization, in training mode."""
    variables = model.init(jax.random.key(seed), batch.images, train=True)
    state = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params: PyTree[Array]) -> Array:
        logits, _ = model.apply({"params": params, **state}, batch.images, train=True, mutable=list(state))
        value: Array = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return value

    gradient = jax.grad(loss)(variables["params"])
    hidden = range(len(gradient) - 1)
    return jnp.stack([jnp.mean(gradient[f"Dense_{layer}"]["kernel"] ** 2) for layer in hidden])


def main() -> int:
    """Runs the program and returns its exit status."""
    config = tyro.cli(Config)
    try:
        for name in config.activations:
            check_activation(name)
        train = DATASETS["digits"]().train
        if not 1 <= config.batch_size <= len(train.labels):
            raise ValueError(f"batch_size must lie between 1 and {len(train.labels)}, got {config.batch_size}")
        for field in ("depth", "width", "seeds"):
            if getattr(config, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(config, field)}")
        config.output.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"gradient_variance.py: {error}", file=sys.stderr)
        return 2
    batch = Split(train.images[: config.batch_size], train.labels[: config.batch_size])

    variances = {}
    for name in config.activations:
        model = MLP(make_layers(name, "none"), classes=10, depth=config.depth, width=config.width)
        measure = jax.jit(lambda seed, model=model: gradient_variance(model, batch, seed))
        samples = np.stack([measure(seed) for seed in range(config.seeds)])
        variances[name] = np.exp(np.log(np.maximum(samples, np.finfo(samples.dtype).tiny)).mean(0))
        print(f"{name}: first layer {variances[name][0]:.1e}, last {variances[name][-1]:.1e}")

    draw(variances, config.output)
    numbers = {name: [float(f"{value:.4g}") for value in values] for name, values in variances.items()}
    settings = dataclasses.asdict(config) | {"output": config.output.name}
    config.output.with_suffix(".json").write_text(json.dumps(settings | {"gradient_variance": numbers}) + "\n")
    return 0


def draw(variances: dict[str, Float[np.ndarray, " depth"]], output: Path) -> None:
    """One line an activation, over layers, dashed where it is plain."""
    figure, panel = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, values in variances.items():
        style = "-" if name.startswith("n") else "--"
        panel.plot(range(1, len(values) + 1), values, style, marker=".", label=name)
    panel.set(yscale="log", xlabel="layer", ylabel="variance of the weight gradient", title="at initialization")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
