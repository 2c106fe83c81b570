"""Two processes that train together, two that must not, and signals to stop."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ROOT

from experiments.config import Experiment, changed
from experiments.training.build import make_network
from experiments.training.loop import train
from experiments.training.metrics import Unheard
from experiments.training.processes import StopSignal, connect, only_process_in
from experiments.training.steps import make_steps

CONFIG = changed(
    Experiment(), model="resnet20", norm="none", train_images=256, batch_size=32, epochs=1, warmup_epochs=0.0
)


def train_part(index: int, count: int, port: int, output: Path) -> None:
    """Eight steps of a ResNet by one of `count` processes; the first one writes the parameters and statistics."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // count)
    config = changed(CONFIG, processes=count, process=index, coordinator=f"127.0.0.1:{port}")
    connect(config)
    assert jax.device_count() == 8
    dataset = config.load_data()
    steps = make_steps(make_network(config.recipe.network, dataset), config.recipe.training, dataset)
    state, _ = train(steps, dataset, config, Unheard(), show_progress=False)
    assert int(state.step) == 8
    if index == 0:
        leaves = jax.tree_util.tree_leaves_with_path(state.variables)
        np.savez(output, **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(index, count, name):
        arguments = map(str, (index, count, port, tmp_path / name))
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        return subprocess.Popen([sys.executable, __file__, *arguments], env=os.environ | {"PYTHONPATH": paths})

    for processes in ([run(0, 2, "two.npz"), run(1, 2, "two.npz")], [run(0, 1, "one.npz")]):
        assert [process.wait(timeout=500) for process in processes] == [0] * len(processes)
    one, two = (np.load(tmp_path / name) for name in ("one.npz", "two.npz"))
    assert sorted(one) == sorted(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_second_process_is_refused(tmp_path):
    with only_process_in(tmp_path):
        problem = f"another process trains in {tmp_path}; wait until it ends, or give another --workdir"
        with pytest.raises(ValueError, match=problem), only_process_in(tmp_path, patience=0.3):
            pass
    with only_process_in(tmp_path, patience=0.0):
        pass


def test_second_process_waits_for_the_first(tmp_path):
    first = only_process_in(tmp_path)
    first.__enter__()
    ending = threading.Timer(0.5, first.__exit__, (None, None, None))
    ending.start()
    with only_process_in(tmp_path, patience=30.0):
        assert not ending.is_alive()


def test_killed_process_leaves_no_lock(tmp_path):
    code = "import fcntl, sys; fcntl.flock(f := open(sys.argv[1], 'w'), 2); print('locked', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process trains in"), only_process_in(tmp_path, patience=0.0):
            pass
        holder.kill()
    with only_process_in(tmp_path, patience=0.0):
        pass


def test_no_locks_there_is_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with only_process_in(tmp_path):
        pass
    said = capsys.readouterr().err
    assert f"{tmp_path} cannot be locked ([Errno 37] No locks available); nothing keeps another" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_stop(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
    assert signal.getsignal(number) is before


def test_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


if __name__ == "__main__":
    train_part(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
