"""An interrupted run goes on as if it had never stopped; what cannot go on says why."""

import gc
import itertools
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_dataset, small_experiment, small_model
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import folders, train_resnet
from experiments.config import changed
from experiments.data import training_batches
from experiments.data.pipeline import standardize
from experiments.training.checkpoints import CheckpointError, Checkpoints, Position, silence_orbax
from experiments.training.loop import BadStepError, PreemptedError, evaluate, first_state, train
from experiments.training.metrics import MetricsLog, draw_learning_curves, read_evaluations, read_metrics
from experiments.training.steps import make_steps

DATASET = small_dataset()

pytestmark = pytest.mark.usefixtures("standard_promotion")

# 2 epochs of 16 steps, and 2 batches of test images.
SETTINGS = small_experiment(epochs=2, batch_size=64, save_every_steps=4)


@pytest.fixture(scope="module", autouse=True)
def silent_orbax():
    hook, levels = sys.unraisablehook, {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
    silence_orbax()
    yield
    with warnings.catch_warnings(action="ignore"):
        gc.collect()  # coroutines that Orbax never awaits where a save fails; or a later test reports them
    sys.unraisablehook = hook
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def steps():
    with jax.numpy_dtype_promotion("standard"):
        return make_steps(small_model(), SETTINGS.recipe.training, DATASET)


@pytest.fixture(scope="module")
def whole(steps, tmp_path_factory):
    """What a run that was never interrupted leaves."""
    with jax.numpy_dtype_promotion("standard"):
        return go_on(steps, tmp_path_factory.mktemp("whole"))


def go_on(steps, workdir, settings=SETTINGS, stop=lambda: False):
    """Trains from the last checkpoint in a folder; final state, accuracy and records."""
    with Checkpoints(workdir, settings) as checkpoints:
        start = checkpoints.restore(first_state(steps, settings), print)
        with MetricsLog(workdir, start.records if start else ()) as log:
            state, accuracy = train(
                steps, DATASET, settings, log, start=start, checkpoints=checkpoints, stop=stop, show_progress=False
            )
    return jax.device_get(state), accuracy, read_metrics(workdir)


def stop_at(call):
    """Says stop the `call`-th time that it is asked."""
    counter = itertools.count(1)
    return lambda: next(counter) == call


def saved_steps(workdir):
    return sorted(int(path.name) // 2 for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def folder_of(workdir, step, evaluated=False):
    return workdir / "checkpoints" / str(2 * step + evaluated)


# The loop asks 16 times in the steps of each epoch and twice in its evaluation.
RARER = [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (16, 16), (24, 22), (36, 32))]


@pytest.mark.parametrize(("call", "last"), [(17, 16), *RARER])
def test_stopped_run_ends_as_uninterrupted(steps, whole, tmp_path, call, last):
    with pytest.raises(PreemptedError):
        go_on(steps, tmp_path, stop=stop_at(call))
    assert saved_steps(tmp_path)[-1] == last
    chex.assert_trees_all_equal(go_on(steps, tmp_path), whole)


@pytest.mark.slow
def test_a_finished_run_gives_the_same_again(steps, whole, tmp_path):
    go_on(steps, tmp_path)
    chex.assert_trees_all_equal(go_on(steps, tmp_path), whole)


@pytest.mark.slow
def test_stops_repeat_and_skip_no_example(tmp_path):
    settings = small_experiment(epochs=2, batch_size=256)
    seen = []

    def note(state, batch):
        seen.append(np.asarray(batch.images))
        return state, {"loss": 1.0, "accuracy": 0.5, "sound": True, "sound_gradient": np.ones(8, bool)}

    noting = make_steps(small_model(), settings.recipe.training, DATASET)._replace(
        train=note, evaluate=lambda state, batch: {"loss": 1.0, "correct": 1, "count": 1}
    )
    for call in (1, 2, 2, 1, 3):
        with pytest.raises(PreemptedError):
            go_on(noting, tmp_path, settings, stop=stop_at(call))
    go_on(noting, tmp_path, settings)
    chex.assert_trees_all_equal(seen, [batch.images for batch in training_batches(DATASET, 256, seed=0, epochs=2)])


def test_the_last_and_the_best_are_kept(steps, tmp_path):
    state = first_state(steps, SETTINGS)
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        for step, accuracy in enumerate([0.3, 0.9, 0.5, 0.7, 0.6], start=1):
            record = {"step": step, "epoch": float(step), "test_accuracy": accuracy}
            checkpoints.save(Position(state, step, measured=True, records=(record,)))
        checkpoints.save(Position(state, 6))
    assert saved_steps(tmp_path) == [2, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["widths=[64,64]", "[!a]", "a*b", "a?b", "50% of", "größer"])
def test_folders_of_any_name(name, steps, tmp_path):
    state = first_state(steps, SETTINGS)
    for folder in (name, "aXb"):
        with Checkpoints(tmp_path / folder, SETTINGS) as checkpoints:
            checkpoints.save(Position(state, step=len(folder)))
    with Checkpoints(tmp_path / name, SETTINGS, read_only=True) as checkpoints:
        found = checkpoints.restore(first_state(steps, SETTINGS), pytest.fail)
    assert found.step == len(name)
    chex.assert_trees_all_equal(found.state, state)


def test_first_checkpoint_is_read_back(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(folders.PosixGPath, "glob", folders._find)  # as Orbax has it: the brackets are a pattern
    state = first_state(steps, SETTINGS)
    with (
        pytest.raises(CheckpointError, match=r"checkpoints/2 cannot be read back \(ValueError: NOT_FOUND"),
        Checkpoints(tmp_path / "[a]", SETTINGS) as checkpoints,
    ):
        checkpoints.save(Position(state, step=1))


def test_first_checkpoint_is_compared(steps, tmp_path, monkeypatch):
    state, reads = first_state(steps, SETTINGS), []

    def read(self, number, start):
        reads.append(number)
        other = start.params | {"Dense_0": jax.tree.map(lambda value: value + 1, start.params["Dense_0"])}
        return Position(start._replace(params=other if len(reads) > 1 else start.params))

    monkeypatch.setattr(Checkpoints, "_position", read)
    with Checkpoints(tmp_path / "same", SETTINGS) as checkpoints:
        checkpoints.save(Position(state, step=1))
        checkpoints.save(Position(state, step=2))
    assert reads == [2]
    with (
        pytest.raises(CheckpointError, match="checkpoints/2 reads back other than it was written"),
        Checkpoints(tmp_path / "other", SETTINGS) as checkpoints,
    ):
        checkpoints.save(Position(state, step=1))


def test_metrics_are_strict_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, 0.5, train_loss=float("nan"), train_accuracy=0.1)
        log.write(2, 1.0, test_loss=float("inf"), test_accuracy=0.25)
    path = tmp_path / "metrics.jsonl"
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())
    assert first == {"step": 1, "epoch": 0.5, "train_loss": None, "train_accuracy": 0.1}
    assert second == {"step": 2, "epoch": 1.0, "test_loss": None, "test_accuracy": 0.25}
    with path.open("a") as file:
        file.write('{"step": 3, "ep')  # by a process that was killed
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2]
    assert np.isnan([records[0]["train_loss"], records[1]["test_loss"]]).all()
    assert read_evaluations(tmp_path) == records[1:]
    draw_learning_curves(tmp_path)
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000


@pytest.mark.parametrize("full", ["metrics.jsonl", "events"])
def test_full_disk_ends_a_log_with_one_error(full, tmp_path, monkeypatch):
    if full == "events":
        monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: Path("/dev/full").open("wb"))  # noqa: SIM115
    else:
        (tmp_path / full).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"), MetricsLog(tmp_path) as log:
        for step in range(3):
            log.write(step, 1.0, train_loss=1.0)


def test_training_leaves_what_is_being_saved(tmp_path):
    """The next step takes over the memory of the state that it is given."""
    settings = small_experiment()
    model = small_model().clone(width=512)
    steps = make_steps(model, settings.recipe.training, DATASET)
    state = first_state(steps, settings)
    batch = next(training_batches(DATASET, 32, seed=0, epochs=1))
    for step in range(1, 4):
        with Checkpoints(tmp_path, settings) as checkpoints:
            expected = jax.tree.map(np.array, state)  # copies
            checkpoints.save(Position(state, step))
            for _ in range(3):
                state, _ = steps.train(state, batch)
            checkpoints.wait()
            found = checkpoints.restore(state, print)
        chex.assert_trees_all_equal(jax.device_get(found.state), expected)


@pytest.mark.parametrize("devices", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_saved_on_eight_devices_read_on_fewer(steps, whole, tmp_path, devices):
    state, *_ = whole
    on_eight = jax.device_put(state, NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec()))
    some = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec())
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(Position(on_eight, 32))
        checkpoints.wait()
        found = checkpoints.restore(jax.device_put(state, some), print).state
    assert len(found.params["Dense_0"]["kernel"].sharding.device_set) == devices
    images = jnp.asarray(standardize(DATASET.test.images, DATASET))
    logits, same = (small_model().apply(s.variables, images, train=False) for s in (state, found))
    np.testing.assert_allclose(logits, same, rtol=1e-5, atol=1e-5)


# What cannot be read.


@pytest.fixture(scope="module")
def interrupted(steps, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("interrupted")
    with jax.numpy_dtype_promotion("standard"), pytest.raises(PreemptedError):
        go_on(steps, workdir, stop=stop_at(24))
    assert saved_steps(workdir)[-1] == 22
    return workdir


def spoil(path, how):
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_never_taken_for_whole(steps, interrupted, tmp_path, how):
    """Whichever file it is: the last checkpoint as it was, or word of the damage and the one before."""
    start = first_state(steps, SETTINGS)
    with Checkpoints(interrupted, SETTINGS) as checkpoints:
        newest = checkpoints.restore(start, print)
    files = sorted(path.relative_to(interrupted) for path in folder_of(interrupted, 22).rglob("*"))
    told = {}
    for number, name in enumerate(name for name in files if (interrupted / name).is_file()):
        workdir = tmp_path / str(number)
        shutil.copytree(interrupted, workdir)
        spoil(workdir / name, how)
        messages = []
        with Checkpoints(workdir, SETTINGS) as checkpoints:
            found = checkpoints.restore(start, messages.append)
        told[str(name)] = messages
        if found.step == 22:
            assert messages == []
            chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(newest))
        else:
            assert found.step == 20
            assert saved_steps(workdir)[-1] == 20
    assert sum(map(len, told.values())) >= 4
    assert all(len(messages) <= 1 and "\n" not in "".join(messages) for messages in told.values())


def test_damaged_checkpoint_changes_no_result(steps, whole, interrupted, tmp_path, capsys):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    for path in folder_of(tmp_path, 22).rglob("d/*"):
        spoil(path, "truncated")
    chex.assert_trees_all_equal(go_on(steps, tmp_path), whole)
    told = capsys.readouterr().out
    assert f"checkpoint {folder_of(tmp_path, 22)} cannot be read" in told
    assert "going on from the one before, and keeping this one as 44.unreadable" in told
    assert list((tmp_path / "checkpoints" / "44.unreadable").rglob("d/*"))


def test_failed_save_loses_nothing_saved(steps, tmp_path, monkeypatch):
    state = first_state(steps, SETTINGS)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(Position(state, 2))
        checkpoints.wait()
        evaluated = Position(state, 2, True, ({"step": 2, "test_accuracy": 0.5},))
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "save", full)
            with pytest.raises(CheckpointError, match="No space left"):
                checkpoints.save(evaluated)
        assert folder_of(tmp_path, 2).exists()
        checkpoints.save(evaluated)
        checkpoints.wait()
        assert folder_of(tmp_path, 2, evaluated=True).exists()
        assert not folder_of(tmp_path, 2).exists()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(OSError("stale file handle"), "restored"), (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "refused")],
)
def test_a_read_that_fails_once_costs_no_checkpoint(steps, tmp_path, monkeypatch, error, outcome):
    state = first_state(steps, SETTINGS)
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(Position(state, step))
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        read, errors = checkpoints._read, [error]

        def once(number, **items):
            if "state" in items and errors:
                raise errors.pop()
            return read(number, **items)

        monkeypatch.setattr(checkpoints, "_read", once)
        if outcome == "restored":
            assert checkpoints.restore(state, print).step == 3
        else:
            with pytest.raises(CheckpointError, match=r"/6 does not fit into memory .*; it is as it was"):
                checkpoints.restore(state, print)
    assert saved_steps(tmp_path) == [1, 2, 3]


def test_unreadable_checkpoints_do_not_start_over(steps, interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").rglob("progress/metadata"):
        spoil(path, "truncated")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read; to start over, remove that folder"):
        go_on(steps, tmp_path)
    assert len(saved_steps(tmp_path)) == 3


def test_a_run_with_other_settings_is_refused(steps, interrupted):
    other = changed(SETTINGS, learning_rate=0.1, activation="swish", workers=7)
    with pytest.raises(
        ValueError,
        match=r"'nswish', now 'swish'; learning_rate 0.05, now 0.1; form 'forward.*', now None",
    ):
        go_on(steps, interrupted, other)


def test_another_network_is_refused(interrupted):
    other = make_steps(small_model().clone(width=8), SETTINGS.recipe.training, DATASET)
    with pytest.raises(ValueError, match=r"another network: params/.*/bias \(16,\), now \(8,\)"):
        go_on(other, interrupted)


@pytest.mark.slow
def test_missing_statistics_start_anew_if_asked(tmp_path):
    plain = changed(SETTINGS, activation="swish")
    normalized = changed(SETTINGS, activation="nswish", epochs=2)
    old, new = (
        make_steps(small_model(c.recipe.network.activation), c.recipe.training, DATASET) for c in (plain, normalized)
    )
    with pytest.raises(PreemptedError):
        go_on(old, tmp_path, plain, stop=stop_at(20))
    with pytest.raises(ValueError, match="activation 'swish', now 'nswish'"):
        go_on(new, tmp_path, normalized)
    asked = changed(normalized, fresh_statistics=True)
    start = first_state(new, asked)
    with Checkpoints(tmp_path, asked) as checkpoints:
        found = checkpoints.restore(start, print)
    assert found.step == 18
    chex.assert_trees_all_equal(found.state.batch_stats["ANAct_0"], start.batch_stats["ANAct_0"])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(found.state.params, start.params)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(found.state.batch_stats["BatchNorm_0"], start.batch_stats["BatchNorm_0"])
    _, accuracy, _ = go_on(new, tmp_path, asked)
    assert accuracy > 0.8


def test_old_checkpoint_without_statistics(tmp_path, steps):
    """As of a program that did not keep them yet."""
    start = first_state(steps, SETTINGS)
    old = start._replace(batch_stats={k: v for k, v in start.batch_stats.items() if not k.startswith("ANAct")})
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(Position(old, 3))
        with pytest.raises(ValueError, match=r"lacks running statistics, batch_stats/ANAct_0/.*--fresh-statistics"):
            checkpoints.restore(start, print)


def test_moments_of_another_form_start_anew_if_asked(tmp_path):
    few, many = changed(SETTINGS, axis=None), changed(SETTINGS, form="published")
    few_moments, all_moments = (
        first_state(make_steps(small_model(form=each.recipe.network.form.chosen), each.recipe.training, DATASET), each)
        for each in (few, many)
    )
    assert set(all_moments.batch_stats["ANAct_0"]) > set(few_moments.batch_stats["ANAct_0"])
    seen = jax.tree.map(lambda leaf: leaf + 1, all_moments.batch_stats)
    with Checkpoints(tmp_path / "all", many) as checkpoints:
        checkpoints.save(Position(all_moments._replace(batch_stats=seen), 3))
    with Checkpoints(tmp_path / "all", changed(few, fresh_statistics=True)) as checkpoints:
        found = checkpoints.restore(few_moments, print).state.batch_stats
    kept = {name: seen["ANAct_0"][name] for name in found["ANAct_0"]}
    chex.assert_trees_all_equal(found["ANAct_0"], kept)

    with Checkpoints(tmp_path / "few", few) as checkpoints:
        checkpoints.save(Position(few_moments._replace(batch_stats=found), 3))
    with (
        Checkpoints(tmp_path / "few", many) as checkpoints,
        pytest.raises(ValueError, match=r"form 'Standardized.*, now 'mean'"),
    ):
        checkpoints.restore(all_moments, print)
    with Checkpoints(tmp_path / "few", changed(many, fresh_statistics=True)) as checkpoints:
        anew = checkpoints.restore(all_moments, print).state.batch_stats
    expected = all_moments.batch_stats["ANAct_0"] | {name: v for name, v in kept.items() if name != "count"}
    chex.assert_trees_all_equal(anew["ANAct_0"], expected)


# What cannot be written.


def test_a_folder_that_is_gone_is_seen(steps, tmp_path):
    def remove():
        if (tmp_path / "checkpoints").is_dir() and len(saved_steps(tmp_path)) == 3:
            shutil.rmtree(tmp_path / "checkpoints")
            (tmp_path / "checkpoints").write_text("in the way")
        return False

    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*those written before are whole"):
        go_on(steps, tmp_path, stop=remove)


# Numbers that are not finite.


def test_early_end_leaves_what_was_measured(steps, tmp_path):
    with pytest.raises(BadStepError, match="at step 3"):
        go_on(with_bad_step(steps, 3), tmp_path)
    (record,) = read_metrics(tmp_path)
    assert record["step"] == 2
    assert np.isfinite(record["train_loss"])


def with_bad_step(steps, at, value=np.nan):
    """The same steps, but the images of one are spoiled."""

    def spoiled(state, batch):
        images = batch.images * value if int(state.step) == at - 1 else batch.images
        return steps.train(state, batch._replace(images=images))

    return steps._replace(train=spoiled)


@pytest.mark.parametrize("value", [np.nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (np.inf, 1e30))])
def test_bad_step_keeps_the_last_checkpoint(steps, tmp_path, value):
    with pytest.raises(BadStepError, match=r"loss is .* at step 22; the gradient of BatchNorm_0, .*is not") as caught:
        go_on(with_bad_step(steps, 22, value), tmp_path)
    assert caught.value.step == 22
    chex.assert_tree_all_finite(caught.value.variables)
    assert saved_steps(tmp_path)[-1] == 20
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        found = checkpoints.restore(first_state(steps, SETTINGS), print)
    chex.assert_tree_all_finite(jax.device_get(found.state))


@pytest.mark.slow
def test_skipped_bad_step_changes_the_count_only(steps, tmp_path):
    settings = changed(SETTINGS, skip_bad_steps=True)
    state = first_state(steps, settings)
    good = [next(training_batches(DATASET, 64, seed=0, epochs=1)) for _ in range(3)]
    for batch in good:
        state, _ = steps.train(state, batch)
    before = jax.tree.map(np.array, state)
    after, metrics = steps.train(state, good[0]._replace(images=good[0].images * np.float32(np.nan)))
    assert not metrics["sound"]
    chex.assert_trees_all_equal(jax.device_get(after), before._replace(step=np.int32(4)))
    _, accuracy, records = go_on(with_bad_step(steps, 22), tmp_path, settings)
    assert accuracy > 0.8
    assert [record["step"] for record in records if "steps_left_out" in record] == [22]
    assert json.dumps(records, allow_nan=False)


def test_evaluation_after_resume(steps, whole):
    state, accuracy, records = whole
    measured = evaluate(steps, jax.tree.map(jnp.asarray, state), DATASET, 64)
    assert float(measured["accuracy"]) == pytest.approx(accuracy)
    assert records[-1]["test_accuracy"] == accuracy


def test_settings_are_refused_before_the_data_are_read(tmp_path, run_main):
    (tmp_path / "config.json").write_text(small_experiment(dataset="cifar10").to_json())
    status, output = run_main(train_resnet, "--dataset", "cifar100", "--epochs", "6", "--workdir", tmp_path)
    assert status == 2
    assert "dataset 'cifar10', now 'cifar100'" in output.err
    assert output.err.count("\n") == 1
