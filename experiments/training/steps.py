"""Training state, the optimizer, and the compiled steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.config import Training
from experiments.data import Batch, Dataset

Metrics: TypeAlias = dict[str, Array]
_PLAINLY = Training()


class TrainState(NamedTuple):
    """All that a step reads and writes.

    Attributes:
        step: steps taken.
        params: of the network.
        batch_stats: its running statistics.
        opt_state: the optimizer's.
        learning_rate: at its peak.
        seed: of what the steps draw by chance.
        average: `variables` averaged over the steps; None where none is kept.
    """

    step: Int[Array, ""]
    params: PyTree[Array]
    batch_stats: PyTree[Array]
    opt_state: PyTree[Array]
    learning_rate: Float[Array, ""]
    seed: Int[Array, ""]
    average: PyTree[Array] = None

    @property
    def variables(self) -> dict[str, Any]:
        """As `apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def evaluated(self) -> dict[str, Any]:
        """The variables that are evaluated: the average where there is one."""
        return self.variables if self.average is None else dict(self.average)


class Steps(NamedTuple):
    """Compiled functions of one network and schedule; they serve every seed and every learning rate.

    Attributes:
        create: seed and learning rate -> fresh state.
        train: state, which is consumed, and batch -> next state and metrics: loss, accuracy, learning rate, and
            unless it is for runs `together`, `sound` and `sound_gradient`, as `make_train_step` says.
        evaluate: state and batch -> sums over the batch's valid examples: loss, correct, count.
    """

    create: Callable[[ArrayLike, ArrayLike], TrainState]
    train: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState, Batch], Metrics]


def make_steps(model: nn.Module, training: Training, dataset: Dataset, *, together: bool = False) -> Steps:
    """The compiled functions; with `together` they take and give a leading axis of runs (`evaluate`: for one batch)."""
    schedule = schedule_of(training, steps_per_epoch(training, dataset))
    optimizer = make_optimizer(training, schedule)
    create: Any = functools.partial(create_state, model, optimizer, dataset.train.shape, averaged=training.ema > 0)
    train, evaluate = make_train_step(model, optimizer, schedule, training, guarded=not together), make_eval_step(model)
    if together:
        create, train, evaluate = jax.vmap(create), jax.vmap(train), jax.vmap(evaluate, (0, None))
    return Steps(jax.jit(create), jax.jit(train, donate_argnums=0), jax.jit(evaluate))


def steps_per_epoch(training: Training, dataset: Dataset) -> int:
    """Full batches in the training data."""
    return len(dataset.train) // training.batch_size


def schedule_of(training: Training, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate at each step, counted from 0, as a part of its peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=round(min(training.warmup_epochs, training.epochs / 2) * steps_per_epoch),
        decay_steps=training.epochs * steps_per_epoch,
    )


def taken(state: TrainState) -> Int[Array, ""]:
    """Steps that the optimizer has taken: those that were not left out."""
    count: Array = optax.tree.get_all_with_path(state.opt_state, "count")[0][1]
    return count


def make_optimizer(training: Training, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum, or Adam; clipping, weight decay on kernels, under a linear rise and a cosine fall.

    Its peak learning rate is 1; the training step multiplies by the state's, so that one compiled
    step serves all learning rates.
    """

    def kernels(params: PyTree[Array]) -> PyTree[bool]:
        return jax.tree.map(lambda parameter: parameter.ndim > 1, params)

    method = optax.adam(schedule, b1=training.momentum) if training.optimizer == "adam" else None
    clip = [] if training.clip_norm is None else [optax.clip_by_global_norm(training.clip_norm)]
    return optax.chain(
        *clip,
        optax.add_decayed_weights(training.weight_decay, mask=kernels),
        method or optax.sgd(schedule, momentum=training.momentum, nesterov=training.nesterov),
    )


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: ArrayLike,
    learning_rate: ArrayLike,
    *,
    averaged: bool = False,
) -> TrainState:
    """Fresh state for images of one shape."""
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    rate = jnp.asarray(learning_rate, jnp.float32)
    state = TrainState(
        jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), rate, jnp.asarray(seed, jnp.int32)
    )
    # A copy: each step consumes the state before it, array by array.
    return state._replace(average=jax.tree.map(jnp.copy, state.variables)) if averaged else state


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    training: Training = _PLAINLY,
    *,
    guarded: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One step: forward, backward, update of parameters and running statistics.

    With mixup, label smoothing and average as `training` says; its optimizer is `optimizer`.
    Compiled over sharded batches, every mean is global, those of the statistics too.

    Guarded, a step whose loss, gradient or next state is not finite changes nothing but the number of steps. The
    metrics then tell whether it was `sound`, and the same of each parameter's gradient, `sound_gradient`, in the
    order of `layer_names`.
    """

    def loss(params: PyTree[Array], state: TrainState, batch: Batch) -> tuple[Array, tuple[Array, PyTree[Array]]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        images, labels, weight = jnp.asarray(batch.images), jnp.asarray(batch.labels), None
        if training.mixup:
            key = jax.random.fold_in(jax.random.key(state.seed), state.step)
            weight = jax.random.beta(key, training.mixup, training.mixup, dtype=images.dtype)
            images = weight * images + (1 - weight) * images[::-1]  # batches come shuffled: any other will do
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        losses = _cross_entropy(logits, labels, training.label_smoothing)
        if weight is not None:
            of_others = _cross_entropy(logits, labels[::-1], training.label_smoothing)
            losses = weight * losses + (1 - weight) * of_others
        return jnp.mean(losses), (logits, updates.get("batch_stats", {}))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (value, (logits, batch_stats)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, state, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        updates = jax.tree.map(lambda update: state.learning_rate.astype(update.dtype) * update, updates)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": value,
            "accuracy": jnp.mean(_correct(logits, batch), dtype=jnp.float32),
            "learning_rate": state.learning_rate * jnp.asarray(schedule(taken(state)), jnp.float32),
        }
        new = state._replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
        if training.ema:
            new = new._replace(average=_averaged(new, training.ema))
        if guarded:
            metrics["sound_gradient"] = _finite(gradient)
            sound = jnp.isfinite(value) & jnp.all(metrics["sound_gradient"]) & jnp.all(_finite(new))
            metrics["sound"] = sound
            new = jax.tree.map(functools.partial(jnp.where, sound), new, state._replace(step=new.step))
        return new, metrics

    return step


def layer_names(params: PyTree[Array]) -> list[str]:
    """For each parameter, in the order of the tree, the layer that has it."""
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    return [jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path in paths]


def _finite(tree: PyTree[Array]) -> Bool[Array, " leaves"]:
    """For each array, whether all of it is finite."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])


def make_eval_step(model: nn.Module) -> Callable[[TrainState, Batch], Metrics]:
    """Sums over a batch's valid examples: loss, correct answers, and their number."""

    def step(state: TrainState, batch: Batch) -> Metrics:
        logits = model.apply(state.evaluated, batch.images, train=False)
        return {
            "loss": jnp.sum(_cross_entropy(logits, jnp.asarray(batch.labels)), where=batch.valid),
            "correct": jnp.sum(_correct(logits, batch), where=batch.valid),
            "count": jnp.sum(batch.valid),
        }

    return step


def _averaged(state: TrainState, decay: float) -> PyTree[Array]:
    """The average after a step; that of the first steps is plain, so that it forgets where it started."""
    weight = jnp.minimum(decay, state.step / (state.step + 9)).astype(jnp.float32)
    return jax.tree.map(
        lambda old, new: (weight * old + (1 - weight) * new).astype(old.dtype), state.average, state.variables
    )


def _cross_entropy(logits: Any, labels: Int[Array, " batch"], smoothing: float = 0.0) -> Float[Array, " batch"]:
    losses: Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing:  # the mean over the classes is what a uniform label gives
        uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        losses = (1 - smoothing) * losses + smoothing * uniform
    return losses


def _correct(logits: Any, batch: Batch) -> Bool[Array, " batch"]:
    return jnp.argmax(logits, axis=-1) == batch.labels
