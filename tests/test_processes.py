"""Two processes on one machine, against one, over the same eight devices and batches."""

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.config import Experiment
from experiments.networks.build import make_network
from experiments.training.loop import train
from experiments.training.metrics import Unheard
from experiments.training.processes import connect
from experiments.training.steps import make_steps

CONFIG = Experiment(model="resnet20", norm="none", train_images=256, batch_size=32, epochs=1, warmup_epochs=0.0)


def train_part(index: int, count: int, port: int, output: Path) -> None:
    """Eight steps of a ResNet by one of `count` processes; the first one writes the parameters and statistics."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // count)
    config = dataclasses.replace(CONFIG, processes=count, process=index, coordinator=f"127.0.0.1:{port}")
    connect(config)
    assert jax.device_count() == 8
    dataset = config.load_data()
    steps = make_steps(make_network(config, dataset), config, dataset)
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
        return subprocess.Popen([sys.executable, "-m", "tests.test_processes", *arguments])

    for processes in ([run(0, 2, "two.npz"), run(1, 2, "two.npz")], [run(0, 1, "one.npz")]):
        assert [process.wait(timeout=500) for process in processes] == [0] * len(processes)
    one, two = (np.load(tmp_path / name) for name in ("one.npz", "two.npz"))
    assert sorted(one) == sorted(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    train_part(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
