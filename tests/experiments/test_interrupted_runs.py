"""The training program, killed, asked to stop, or with its disk full, and started again with the same command."""

import os
import pty
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT

from experiments.training.metrics import read_metrics

pytestmark = pytest.mark.slow

SETTINGS = [
    "--no-compare",
    "--model=mlp5",
    "--norm=batch",
    "--epochs=4",
    "--batch-size=64",
    "--train-images=512",
    "--save-every-steps=1",
]
STEPS = 32
LEADER = (  # runs a command as the leader of a session with the terminal that it reads from
    sys.executable,
    "-c",
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    return os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def start(environment):
    """Starts the training program in a folder."""

    def start(workdir, *arguments, devices=1, before=(), **options):
        command = [*before, sys.executable, str(ROOT / "experiments" / "train_resnet.py"), *SETTINGS]
        return subprocess.Popen(
            [*command, "--workdir", str(workdir), *arguments],
            env=environment | {"JAX_NUM_CPU_DEVICES": str(devices)},
            text=True,
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
        )

    return start


def saved_steps(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(path.name) // 2 for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def until(condition, process, seconds=240):
    """Waits for something to be true while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out, err


def arrays(workdir):
    """What the last checkpoint holds."""
    handlers = {"state": ocp.StandardCheckpointHandler()}
    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=handlers) as manager:
        step, here = manager.latest_step(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            for name, leaf in manager.item_metadata(step)["state"].tree.items()
        }
        read = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
    return {name: np.asarray(value) for name, value in read["state"].items()}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(workdir))
    return workdir


def check_the_same(workdir, whole):
    assert read_metrics(workdir) == read_metrics(whole)
    assert saved_steps(workdir)[-1] == saved_steps(whole)[-1] == STEPS
    found, expected = arrays(workdir), arrays(whole)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []


def test_kills_at_random_moments_change_nothing(start, whole, tmp_path):
    rng = random.Random(0)
    during_a_save = 0
    for step in sorted(rng.sample(range(STEPS), 10)):
        process = start(tmp_path)
        until(lambda step=step: step == 0 or (saved_steps(tmp_path) or [0])[-1] >= step, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        during_a_save += any("tmp" in path.name for path in (tmp_path / "checkpoints").glob("*"))
    finish(start(tmp_path))
    check_the_same(tmp_path, whole)
    assert during_a_save > 0


def test_asked_to_stop_it_saves_and_goes_on(start, whole, tmp_path):
    process = start(tmp_path)
    until(lambda: (saved_steps(tmp_path) or [0])[-1] >= 9, process)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, err = finish(process, status=75)
    assert time.monotonic() - asked < 30
    assert err.splitlines()[-1] == (
        f"train_resnet.py: asked to stop; saved, the same command with --workdir {tmp_path} goes on"
    )
    step = saved_steps(tmp_path)[-1]
    _, err = finish(start(tmp_path))
    assert f"going on from step {step} in {tmp_path}" in err
    check_the_same(tmp_path, whole)


def test_full_disk_leaves_whole_checkpoints(start, whole, tmp_path):
    process = start(tmp_path)
    until(lambda: (saved_steps(tmp_path) or [0])[-1] >= 3, process)
    process.send_signal(signal.SIGTERM)
    finish(process, status=75)
    step = saved_steps(tmp_path)[-1]

    process = start(tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    _, err = finish(process, status=1)
    assert f"train_resnet.py: cannot write a checkpoint to {tmp_path}/checkpoints (" in err.splitlines()[-1]
    assert saved_steps(tmp_path)[-1] == step
    finish(start(tmp_path))
    check_the_same(tmp_path, whole)


def test_full_log_is_one_line(start, whole, tmp_path):
    stopped_after(20, tmp_path, start(tmp_path))
    assert (tmp_path / "config.json").stat().st_size < 2000 < (tmp_path / "metrics.jsonl").stat().st_size
    process = start(tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, 2000))
    _, err = finish(process, status=1)
    expected = f"train_resnet.py: OSError: [Errno 27] File too large; what was measured is in {tmp_path}"
    assert err.splitlines()[-1] == expected
    assert [line for line in err.splitlines() if "rror" in line] == [expected]
    finish(start(tmp_path))
    check_the_same(tmp_path, whole)


def test_closed_terminal_saves(start, whole, tmp_path):
    """The program leads a session whose terminal goes away, and with it all that it could write to."""
    terminal, its_end = pty.openpty()

    process = start(tmp_path, before=LEADER, stdin=its_end, stdout=its_end, stderr=its_end)
    os.close(its_end)
    until(lambda: (saved_steps(tmp_path) or [0])[-1] >= 3, process)
    os.close(terminal)
    assert process.wait(timeout=60) == 75
    step = saved_steps(tmp_path)[-1]
    _, err = finish(start(tmp_path))
    assert f"going on from step {step} in {tmp_path}" in err
    check_the_same(tmp_path, whole)


def test_bad_loss_names_its_layer_and_gains(start, tmp_path):
    _, err = finish(start(tmp_path, "--norm", "none", "--learning-rate", "1e20"), status=1)
    for part in ("the loss is ", " at step ", "the gradient of ", "has forward gain", "what was measured is in"):
        assert part in err.splitlines()[-1]
    assert all(np.isfinite(value).all() for value in arrays(tmp_path).values())


def check_the_same_to_rounding(workdir, other):
    found, expected = read_metrics(workdir), read_metrics(other)
    assert [list(record) for record in found] == [list(record) for record in expected]
    for record, same in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(record.values()), list(same.values()), rtol=1e-2, atol=1e-2)
    for name, value in arrays(workdir).items():
        np.testing.assert_allclose(value, arrays(other)[name], rtol=1e-2, atol=1e-3, err_msg=name)


def stopped_after(step, workdir, process):
    until(lambda: (saved_steps(workdir) or [0])[-1] >= step, process)
    process.send_signal(signal.SIGTERM)
    finish(process, status=75)


def test_run_goes_on_with_other_devices(start, tmp_path):
    first, *others = (tmp_path / str(devices) for devices in (8, 1, 2))
    stopped_after(9, first, start(first, devices=8))
    for other in others:
        shutil.copytree(first, other)
    for workdir in (first, *others):
        finish(start(workdir, devices=int(workdir.name)))
    for other in others:
        check_the_same_to_rounding(other, first)


def together(start, workdir):
    """Two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(workdir, "--processes=2", f"--process={i}", f"--coordinator=127.0.0.1:{port}") for i in (0, 1)]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_run_goes_on(start, whole, tmp_path, victim):
    """First alone, then as two again: the same to rounding as in one process from end to end."""
    processes = together(start, tmp_path)
    until(lambda: (saved_steps(tmp_path) or [0])[-1] >= 3, processes[1 - victim])
    processes[victim].kill()
    _, err = processes[1 - victim].communicate(timeout=60)
    # Where the coordinator is gone, JAX may end the process itself before the program can.
    assert processes[1 - victim].returncode in ((1, -signal.SIGABRT) if victim == 0 else (1,))
    assert "is another process gone? Start all again, with the same commands" in err or "another task died" in err
    processes[victim].communicate()
    stopped_after(6, tmp_path, start(tmp_path))
    for process in together(start, tmp_path):
        finish(process)
    check_the_same_to_rounding(tmp_path, whole)
