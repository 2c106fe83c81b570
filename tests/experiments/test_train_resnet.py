import contextlib
import functools
import json
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, small_dataset, small_experiment, small_model

from experiments import train_resnet
from experiments.config import Experiment, Training, changed, flat, read_experiment
from experiments.data import Batch
from experiments.data.pipeline import standardize
from experiments.recipes import RECIPES
from experiments.training.loop import DivergenceError, train
from experiments.training.metrics import MetricsLog, draw_learning_curves, read_metrics
from experiments.training.processes import only_process_in
from experiments.training.steps import (
    create_state,
    make_eval_step,
    make_optimizer,
    make_steps,
    make_train_step,
    schedule_of,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

PROGRAM = [sys.executable, str(ROOT / "experiments" / "train_resnet.py")]


DATASET = small_dataset()


def run(model, config, log):
    return train(make_steps(model, config.recipe.training, DATASET), DATASET, config, log)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activation", "swsh"], "unknown activation 'swsh'; expected one of elu, gelu"),
        (["--activation", "nnswish"], "unknown activation 'nnswish'"),
        (["--recipe", "resnet"], "unknown recipe 'resnet'; expected one of digits, fashion_mnist, resnet18_cifar100"),
        (
            ["--form", "published", "--std", "1"],
            "std belongs to form default, not to published; leave it out",
        ),
        (["--form", "published", "--tempering", "0.1"], "tempering belongs to form default, not to published"),
        (["--learned"], "learned belongs to form published, not to default; leave it out, or at False"),
        (["--std", "0"], "std must be a positive number, such as 1 or 0.5, got 0"),
        (["--tempering", "-1"], "tempering must be a positive number"),
        (["--activation", "swish", "--std", "1"], "std has no effect with activation 'swish'; leave it out"),
        (["--config", "/nowhere.json"], "No such file"),
        (["--dataset", "imagenet"], "unknown dataset 'imagenet'; expected one of digits"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--batch-size", "1440"], "batch_size 1440 is larger than the training data, 1437 examples"),
        (["--batch-size", "20"], "batch_size 20 must be a multiple of the number of devices, 8"),
        (["--learning-rate", "-0.1"], "learning_rate must be a positive number, got -0.1"),
        (["--learning-rate", "nan"], "learning_rate must be a positive number, got nan"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--activation", "nswsh"], "Did you mean 'nswish'?"),
        (["--activation", "swish", "--form", "published"], "form has no effect with activation 'swish'; leave it out"),
        (["--recipe", "resnet18_cifar100", "--activation", "swish"], "leave it out, or at 'default'"),
        (["--seed", str(2**32)], "seed must be less than 2**31, got 4294967296"),
        (["--momentum", "1.2"], "momentum must lie in [0, 1], got 1.2"),
        (["--weight-decay", "-1"], "weight_decay must be at least 0"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--workdir", "/dev/null/here"], "Not a directory"),
        (
            ["--workdir", "/nowhere/a\\b"],
            "'/nowhere/a\\\\b' cannot hold checkpoints: expected UTF-8 without backslashes",
        ),
        (["--workdir", "/nowhere/\udcff"], "'/nowhere/\\udcff' cannot hold checkpoints"),
        (["--recipe", "digits", "--config", "x.json"], "--recipe and --config both say where the settings start"),
        (["--cutout", "99"], "cutout 99 is larger than the images, 8x8"),
        (["--cutout", "9"], "cutout 9 is larger than the images, 8x8"),
        (["--pool", "2", "--cutout", "5"], "cutout 5 is larger than the images, 4x4"),
    ],
)
def test_bad_settings_end_in_one_line_before_training(arguments, message, refused):
    output = refused(train_resnet, *arguments, message=message)
    assert output.out == ""


@pytest.mark.parametrize(
    ("setting", "value"),
    [("form", "median"), ("model", "resnet21"), ("norm", "instance"), ("stem", "big"), ("init", "zeros")],
)
def test_unknown_choices_are_refused(setting, value, tmp_path, run_main, refused, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(train_resnet, f"--{setting}", value)
    assert end.value.code == 2
    assert f"invalid choice '{value}'" in capsys.readouterr().err
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(Experiment().to_json()) | {setting: value}))
    refused(train_resnet, "--config", path, message=f"unknown {setting} '{value}'; expected ")


def test_a_finished_run_is_not_overwritten(tmp_path, run_main):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    status, output = run_main(train_resnet, "--workdir", str(tmp_path))
    assert status == 2
    assert "holds a run already; give another --workdir" in output.err
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_run_of_another_process_is_left_alone(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(train_resnet, "only_process_in", functools.partial(only_process_in, patience=0.0))
    with only_process_in(tmp_path):
        message = f"another process trains in {tmp_path}; wait until it ends, or give another --workdir"
        refused(train_resnet, "--no-compare", "--workdir", tmp_path, message=message)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_another_run_left_meanwhile_is_kept(tmp_path, monkeypatch, refused):
    @contextlib.contextmanager
    def wait_for_another(workdir):
        train_resnet.prepare_workdir(workdir, changed(Experiment(), model="mlp5", seed=1))
        yield

    monkeypatch.setattr(train_resnet, "only_process_in", wait_for_another)
    arguments = ("--no-compare", "--model", "mlp5", "--workdir", tmp_path)
    refused(train_resnet, *arguments, message="holds a run with other settings")
    assert read_experiment(tmp_path).recipe.seed == 1


def test_help_explains_every_setting(capsys, run_main):
    with pytest.raises(SystemExit) as end:
        run_main(train_resnet, "--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in flat(Experiment()):
        assert f"--{name.replace('_', '-')}" in text
    for name in ("resnet56", "published", "swish", "digits", *RECIPES):
        assert name in text
    parts = ("recipe", "recipe.data", "recipe.network", "recipe.training", "run", "storage")
    shown = [text.index(f" {part} options ") for part in parts]
    assert shown == sorted(shown)
    assert shown[0] < text.index("--learning-rate FLOAT") < shown[1]
    for explained in ("peak learning rate; it rises linearly", "side of a square", "L2 penalty"):
        assert explained in text


@pytest.mark.parametrize("activation", [pytest.param("swish", marks=pytest.mark.slow), "nswish"])
def test_training_learns_and_records_what_it_measures(activation, tmp_path):
    with MetricsLog(tmp_path) as log:
        state, accuracy = run(small_model(activation), small_experiment(), log)
    assert accuracy > 0.9
    assert int(state.step) == 6 * 32
    records = read_metrics(tmp_path)
    assert [r["epoch"] for r in records if "test_accuracy" in r] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["test_accuracy"] == accuracy
    assert all(("factor_min" in r) == (activation == "nswish") for r in records if "train_loss" in r)
    draw_learning_curves(tmp_path)
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_test_accuracy_counts_every_example_once(tmp_path):
    with MetricsLog(tmp_path) as log:
        state, accuracy = run(small_model(), small_experiment(), log)
    images = jnp.asarray(standardize(DATASET.test.images, DATASET))
    logits = small_model().apply(jax.device_get(state.variables), images, train=False)
    assert accuracy == np.mean(np.asarray(logits).argmax(-1) == DATASET.test.labels)


@pytest.mark.slow
def test_same_seed_gives_the_same_numbers(tmp_path):
    records = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        with MetricsLog(tmp_path / str(number)) as log:
            run(small_model(), small_experiment(seed=number // 2, epochs=2), log)
        records.append((tmp_path / str(number) / "metrics.jsonl").read_text())
    assert records[0] == records[1]
    assert records[0] != records[2]


def test_divergence_keeps_what_was_measured(tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(DivergenceError, match=r"the loss is (nan|inf) at step"):
        run(small_model(norm="none"), small_experiment(learning_rate=1e12), log)
    assert all(np.isfinite(record["train_loss"]) for record in read_metrics(tmp_path))


def test_the_last_steps_of_an_epoch_are_recorded_too(tmp_path):
    with MetricsLog(tmp_path) as log:
        run(small_model(), small_experiment(epochs=2), log)
    assert [r["step"] for r in read_metrics(tmp_path) if "train_loss" in r and r["step"] % 32 == 0] == [32, 64]


@pytest.mark.slow
def test_step_over_eight_devices_equals_one(tmp_path):
    assert jax.local_device_count() == 8
    with MetricsLog(tmp_path) as log:
        sharded, _ = run(small_model(), small_experiment(epochs=2), log)
    assert len(sharded.params["Dense_0"]["kernel"].sharding.device_set) == 8
    recipe = small_experiment(epochs=2).recipe
    schedule = schedule_of(recipe.training, 32)
    model, optimizer = small_model(), make_optimizer(recipe.training, schedule)
    state = create_state(model, optimizer, (4, 4, 1), 0, recipe.learning_rate)
    step = jax.jit(make_train_step(model, optimizer, schedule))
    for epoch in range(2):
        order = np.random.default_rng((0, epoch)).permutation(1024).reshape(32, 32)
        for rows in order:
            images = standardize(DATASET.train.images[rows], DATASET)
            state, _ = step(state, Batch(images, DATASET.train.labels[rows], np.ones(32, bool)))
    chex.assert_trees_all_close(jax.device_get(sharded.params), jax.device_get(state.params), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(sharded.batch_stats), jax.device_get(state.batch_stats), rtol=1e-4, atol=1e-5
    )


def test_weight_decay_acts_on_kernels_alone():
    optimizer = make_optimizer(Training(weight_decay=0.1, momentum=0.0), lambda step: 1.0)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-5)  # times the learning rate in the step
    np.testing.assert_allclose(updates["bias"], 0.0)


def test_padding_does_not_count_in_evaluation():
    model, optimizer = small_model(), make_optimizer(Training(), lambda step: 1.0)
    state = create_state(model, optimizer, (4, 4, 1), 0, 0.05)
    evaluate = jax.jit(make_eval_step(model))
    images, labels = standardize(DATASET.test.images[:8], DATASET), DATASET.test.labels[:8]
    whole = evaluate(state, Batch(images, labels, np.ones(8, bool)))
    valid = np.arange(8) < 5
    part = evaluate(state, Batch(images, labels, valid))
    rest = evaluate(state, Batch(images, labels, ~valid))
    chex.assert_trees_all_close(jax.tree.map(jnp.add, part, rest), whole, rtol=1e-5)
    assert int(part["count"]) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("heed_ctrl_c")
def test_ctrl_c_while_it_compiles_is_one_line(tmp_path):
    run = subprocess.Popen([*PROGRAM, "--no-compare", "--workdir", tmp_path], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "config.json").exists():
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=120)[1]
    assert run.returncode == 130
    assert err.splitlines()[-1] == f"train_resnet.py: interrupted; what was measured is in {tmp_path}"
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.usefixtures("heed_ctrl_c")
def test_ctrl_c_leaves_readable_results(tmp_path):
    command = [*PROGRAM, "--no-compare", "--workdir", tmp_path]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").stat().st_size == 0:
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == f"train_resnet.py: interrupted; what was measured is in {tmp_path}"
    assert "Traceback" not in err
    assert read_metrics(tmp_path)[0]["train_loss"] > 0
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_program_leaves_its_results_in_workdir(tmp_path):
    arguments = ["--model", "resnet20", "--epochs", "2", "--activation", "ngelu", "--norm", "group", "--no-compare"]
    arguments += ["--workdir", tmp_path / "run"]
    run = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=True)
    records = read_metrics(tmp_path / "run")
    assert run.stdout.splitlines()[-1] == (
        f"test_accuracy={records[-1]['test_accuracy']:.4f} workdir={tmp_path / 'run'}"
    )
    assert records[-1]["test_accuracy"] > 0.5
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert (recipe["network"]["activation"], recipe["network"]["norm"], recipe["seed"]) == ("ngelu", "group", 0)
    for picture in ("gains.png", "learning_curves.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
    for shown in ("loss", "accuracy", "factors", "epoch 2/2"):
        assert shown in run.stderr
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    assert 0 < rates[0] < max(rates) <= 0.05
    assert rates[-1] < 0.001
    gains = [name for name in records[-1] if name.startswith("gain_")]
    assert len(gains) == 2 * 19
    assert 0.1 < records[-1]["gain_forward/BasicBlock_0/ANAct_1"] < 10
    shown = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("events.*"))
    for name in (
        b"test/accuracy",
        b"learning/rate",
        b"gain/backward/BasicBlock_8/ANAct_0",
        b"learning_curves",
        b"gains",
    ):
        assert name in shown
    assert shown.count(b"\x89PNG") == 2


def test_a_recipe_is_where_settings_start():
    config = train_resnet.parse(["--seed", "3", "--recipe", "resnet50_cifar100", "--epochs", "7"])
    assert config == changed(RECIPES["resnet50_cifar100"].config, seed=3, epochs=7)
    assert train_resnet.parse([]) == RECIPES["digits"].config


@pytest.mark.slow
def test_plain_activation_is_trained_beside(tmp_path, run_main):
    arguments = ("--model", "mlp10", "--epochs", "2", "--learning-rate", "0.02", "--workdir", str(tmp_path))
    status, output = run_main(train_resnet, *arguments)
    assert status == 0
    accuracies = [read_metrics(folder)[-1]["test_accuracy"] for folder in (tmp_path / "plain", tmp_path)]
    assert accuracies[0] < 0.5 < accuracies[1]
    *_, both, last = output.out.splitlines()
    picture = tmp_path / "comparison.png"
    assert both == f"swish: {accuracies[0]:.4f}, nswish: {accuracies[1]:.4f}; both: {picture}"
    assert last == f"test_accuracy={accuracies[1]:.4f} workdir={tmp_path}"
    assert picture.stat().st_size > 10_000
    assert "first with plain swish, for comparison; --no-compare leaves this out" in output.err
    status, again = run_main(train_resnet, *arguments)  # goes on, and has nothing left to do
    assert status == 0
    assert again.out == output.out


@pytest.mark.slow
def test_a_plain_activation_that_diverges_ends_nothing(tmp_path, run_main):
    arguments = ("--model", "resmlp48", "--epochs", "1", "--learning-rate", "0.5", "--train-images", "256")
    status, output = run_main(train_resnet, *arguments, "--warmup-epochs", "0", "--workdir", str(tmp_path))
    assert status == 0
    assert "swish: diverged in the first epoch, nswish: 0." in output.out


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "1e-3", 'a number, got "1e-3"'),
        ("learning_rate", True, "a number, got true"),
        ("learning_rate", None, "a number, got null"),
        ("epochs", 2.5, "a whole number, got 2.5"),
        ("epochs", False, "a whole number, got false"),
        ("seed", [1], "a whole number, got [1]"),
        ("train_images", "512", 'a whole number or null, got "512"'),
        ("clip_norm", "none", 'a number or null, got "none"'),
        ("nesterov", "no", 'true or false, got "no"'),
        ("augment", 0, "true or false, got 0"),
        ("data_dir", 1, "a folder, as text or null, got 1"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(name, value, expected, tmp_path, refused):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(Experiment().to_json()) | {name: value}))
    refused(train_resnet, "--config", path, message=f"{path}: {name} must be {expected}\n")


def test_a_whole_number_is_a_number(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(Experiment().to_json()) | {"learning_rate": 1, "clip_norm": 2}))
    found = train_resnet.parse(["--config", str(path)])
    assert [(type(value), value) for value in (found.recipe.learning_rate, found.recipe.training.clip_norm)] == [
        (float, 1.0),
        (float, 2.0),
    ]


def test_what_a_run_wrote_is_where_settings_start(tmp_path):
    config = changed(Experiment(), activation="ntanh", form="published", epochs=3, workdir=tmp_path, data_dir=tmp_path)
    train_resnet.prepare_workdir(tmp_path, config)
    found = train_resnet.parse(["--config", str(tmp_path / "config.json"), "--seed", "3"])
    assert found == changed(config, workdir=None, seed=3)
