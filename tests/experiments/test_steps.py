"""The compiled training step: each setting does what it says, and nothing where it is off."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small_dataset, small_experiment

from experiments.config import Training, changed
from experiments.data import Batch, training_batches
from experiments.training.build import make_network
from experiments.training.steps import create_state, make_optimizer, make_steps, make_train_step, schedule_of

DATASET = small_dataset()

pytestmark = pytest.mark.usefixtures("standard_promotion")

SETTINGS = small_experiment(model="mlp5", activation="swish", norm="none", batch_size=32, warmup_epochs=0.0).recipe


@functools.cache
def batches():
    return list(training_batches(DATASET, 32, seed=0, epochs=1))[:4]


def run(recipe, count=4):
    """The compiled functions, the states from the first on, and the loss of each step."""
    steps = make_steps(make_network(recipe.network, DATASET), recipe.training, DATASET)
    state = steps.create(recipe.seed, recipe.learning_rate)
    states, losses = [jax.device_get(state)], []
    for batch in batches()[:count]:
        state, metrics = steps.train(state, batch)
        states.append(jax.device_get(state))
        losses.append(float(metrics["loss"]))
    return steps, states, losses


def logits_and_loss(recipe, labels, **settings):
    """Of the first step, at the initial weights: what the network gives, and the loss that the step reports."""
    recipe = changed(recipe, **settings)
    batch = batches()[0]._replace(labels=labels)
    model = make_network(recipe.network, DATASET)
    steps = make_steps(model, recipe.training, DATASET)
    start = steps.create(0, 0.1)
    logits = functools.partial(model.apply, start.variables, train=True, mutable=["batch_stats"])
    state = jax.tree.map(jnp.copy, start)
    return start, lambda images: logits(jnp.asarray(images))[0], float(steps.train(state, batch)[1]["loss"])


def test_label_smoothing_is_optax_s():
    batch = batches()[0]
    _, logits, loss = logits_and_loss(SETTINGS, batch.labels, label_smoothing=0.1)
    soft = optax.smooth_labels(jax.nn.one_hot(batch.labels, 2), 0.1)
    expected = optax.softmax_cross_entropy(logits(batch.images), soft).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_mixup_blends_images_and_labels_by_one_weight():
    batch = batches()[0]
    start, logits, loss = logits_and_loss(SETTINGS, batch.labels, mixup=0.4)
    weight = float(jax.random.beta(jax.random.fold_in(jax.random.key(start.seed), start.step), 0.4, 0.4))
    assert 0 < weight < 1
    hard = jax.nn.one_hot(batch.labels, 2)
    images, soft = (weight * part + (1 - weight) * part[::-1] for part in (batch.images, hard))
    expected = optax.softmax_cross_entropy(logits(images), soft).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_mixup_draws_by_seed_and_step():
    def weight(seed, step):
        return float(jax.random.beta(jax.random.fold_in(jax.random.key(seed), step), 0.4, 0.4))

    assert len({weight(seed, step) for seed in (0, 1) for step in (0, 1)}) == 4
    recipe = changed(SETTINGS, mixup=1.0, learning_rate=1e-30, weight_decay=0.0, seed=3)
    steps, states, _ = run(recipe, 1)
    assert states[0].seed == 3
    losses = [float(steps.train(states[i]._replace(params=states[0].params), batches()[0])[1]["loss"]) for i in (0, 1)]
    assert losses[0] != losses[1]  # the same batch and weights, another step


def test_average_of_weights_is_evaluated():
    recipe = changed(SETTINGS, activation="nswish", ema=0.9)
    steps, states, _ = run(recipe)
    expected = states[0].variables
    for step, state in enumerate(states[1:], start=1):
        decay = min(0.9, step / (step + 9))
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, expected, state.variables)
    chex.assert_trees_all_close(states[-1].average, expected, rtol=1e-5, atol=1e-7)
    last = states[-1]
    one = steps.evaluate(last, batches()[0])
    averaged = last._replace(params=last.average["params"], batch_stats=last.average["batch_stats"], average=None)
    chex.assert_trees_all_close(one, steps.evaluate(averaged, batches()[0]), rtol=1e-6)
    assert float(one["loss"]) != float(steps.evaluate(last._replace(average=None), batches()[0])["loss"])


def test_clipping_bounds_the_norm_of_the_gradient():
    recipe = changed(SETTINGS, clip_norm=1e-3, weight_decay=0.0, momentum=0.0, learning_rate=1.0)
    steps = make_steps(make_network(recipe.network, DATASET), recipe.training, DATASET)
    start = steps.create(0, 1.0)
    before = jax.device_get(start.params)
    after, _ = steps.train(start, batches()[0])
    change = jax.tree.map(lambda a, b: a - b, before, jax.device_get(after.params))
    squares = sum(np.sum(leaf**2) for leaf in jax.tree.leaves(change))
    np.testing.assert_allclose(np.sqrt(squares), 1e-3, rtol=1e-3)


def test_nesterov_looks_ahead():
    trace = optax.sgd(1.0, momentum=0.9, nesterov=True)
    gradient = jnp.ones(3)
    state = trace.init(gradient)
    optimizer = make_optimizer(Training(nesterov=True, weight_decay=0.0), lambda step: 1.0)
    expected, _ = trace.update(gradient, state)
    found, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(("model", "norm"), [("resnet20", "batch"), ("mlp5", "none"), ("resnet20", "group")])
def test_bfloat16_keeps_parameters_in_float32(model, norm):
    recipe = changed(SETTINGS, activation="nswish", model=model, norm=norm, dtype="bfloat16")
    network, schedule = make_network(recipe.network, DATASET), schedule_of(recipe.training, 32)
    optimizer = make_optimizer(recipe.training, schedule)
    step = make_train_step(network, optimizer, schedule, recipe.training)
    start = jax.eval_shape(functools.partial(create_state, network, optimizer, DATASET.train.shape), 0, 0.1)
    batch = Batch(*(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in batches()[0]))
    text = str(jax.make_jaxpr(step)(start, batch))
    products = [line for line in text.splitlines() if "dot_general[" in line or "conv_general_dilated[" in line]
    assert sum(":bf16[" in line for line in products) >= 0.8 * len(products) > 0
    after, metrics = jax.eval_shape(step, start, batch)
    chex.assert_trees_all_equal_dtypes(after, start)
    assert metrics["loss"].dtype == jnp.float32
    logits = jax.eval_shape(functools.partial(network.apply, train=False), start.variables, batch.images)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(("epochs", "warmup", "peak"), [(1, 1.0, 5), (10, 1.0, 10), (10, 3.0, 30)])
def test_warmup_takes_half_of_training_at_most(epochs, warmup, peak):
    schedule = schedule_of(Training(epochs, warmup_epochs=warmup), 10)
    rates = [float(schedule(step)) for step in range(10 * epochs)]
    assert int(np.argmax(rates)) == peak
    assert rates[-1] < 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"label_smoothing": 0.1, "mixup": 0.2, "nesterov": True, "clip_norm": 1.0},
        {"ema": 0.99},
        {"ema": 0.99, "norm": "batch", "activation": "swish"},
    ],
)
def test_training_learns_with_each_setting(settings):
    recipe = changed(SETTINGS, **{"activation": "nswish", "epochs": 4} | settings)
    steps = make_steps(make_network(recipe.network, DATASET), recipe.training, DATASET)
    state = steps.create(0, recipe.learning_rate)
    for batch in training_batches(DATASET, 32, seed=0, epochs=4):
        state, _ = steps.train(state, batch)
    images, labels = DATASET.test.fetch(np.arange(100))
    found = steps.evaluate(state, Batch((images - 127.5) / np.float32(74.0), labels, np.ones(100, bool)))
    assert float(found["correct"]) >= 90
