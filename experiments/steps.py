"""Training state, the optimizer, and the two compiled steps."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.config import TrainConfig
from experiments.data import Batch

Metrics: TypeAlias = dict[str, Array]


class TrainState(NamedTuple):
    """All that a step reads and writes."""

    step: Int[Array, ""]
    params: PyTree[Array]
    batch_stats: PyTree[Array]
    opt_state: PyTree[Array]

    @property
    def variables(self) -> dict[str, Any]:
        """As `apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum and weight decay on kernels, under a linear rise and a cosine fall."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        decay_steps=config.epochs * steps_per_epoch,
    )

    def kernels(params: PyTree[Array]) -> PyTree[bool]:
        return jax.tree.map(lambda parameter: parameter.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=kernels), optax.sgd(schedule, momentum=config.momentum)
    )


def create_state(
    model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int
) -> TrainState:
    """Fresh state for images of one shape."""
    variables = jax.jit(model.init, static_argnames="train")(
        jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False
    )
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), optimizer.init(params))


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One compiled step: forward, backward, update of parameters and running statistics.

    Over sharded batches the compiler makes every mean global, those of the statistics too. The
    state given to it is consumed.
    """

    def loss(params: PyTree[Array], state: TrainState, batch: Batch) -> tuple[Array, tuple[Array, PyTree[Array]]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = model.apply(variables, batch.images, train=True, mutable=["batch_stats"])
        return jnp.mean(_cross_entropy(logits, batch)), (logits, updates.get("batch_stats", {}))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (value, (logits, batch_stats)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, state, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "accuracy": jnp.mean(_correct(logits, batch), dtype=jnp.float32)}
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(model: nn.Module) -> Callable[[TrainState, Batch], Metrics]:
    """Compiled sums over a batch's valid examples: loss, correct answers, and their number."""

    def step(state: TrainState, batch: Batch) -> Metrics:
        logits = model.apply(state.variables, batch.images, train=False)
        return {
            "loss": jnp.sum(_cross_entropy(logits, batch), where=batch.valid),
            "correct": jnp.sum(_correct(logits, batch), where=batch.valid),
            "count": jnp.sum(batch.valid),
        }

    return jax.jit(step)


def _cross_entropy(logits: Any, batch: Batch) -> Float[Array, " batch"]:
    losses: Array = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses


def _correct(logits: Any, batch: Batch) -> Bool[Array, " batch"]:
    return jnp.argmax(logits, axis=-1) == batch.labels
