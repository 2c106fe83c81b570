"""What all programs share: how they end, and what they make of a path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PROGRAMS, ROOT

from experiments import train_resnet
from experiments.cli import at_home
from experiments.config import read_experiment
from experiments.predict import PredictConfig

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
IMPORTS_INTERRUPTED = """
import runpy, signal, sys
class CtrlC:
    def find_spec(self, name, path, target=None):
        if name in ("jax", "sklearn"):
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:  # as an extension module may do that is just imported
                pass
sys.meta_path.insert(0, CtrlC())
runpy.run_path(PROGRAM, run_name="__main__")
"""
SENT_IN_MAIN = """
from experiments.cli import run_program
def main():
    signal.raise_signal(signal.SIGINT)
    return 0
run_program(main)
"""
SWALLOWED_BY_A_DESTRUCTOR = """
import time
from experiments.cli import run_program
class Heedless:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def main():
    Heedless()
    time.sleep(20)
    return 0
run_program(main)
"""
SENT_AT_THE_END = """
import atexit
from experiments.cli import run_program
atexit.register(signal.raise_signal, signal.SIGINT)
def main():
    print("result")
    return 0
run_program(main)
"""
WITH_A_WORKER = """
import experiments.cli
import multiprocessing, signal
def work():
    print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    worker.join()
"""
IGNORED = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
from experiments.cli import run_program
def main():
    signal.raise_signal(signal.SIGINT)
    print("result")
    return 0
run_program(main)
"""


def ended(program):
    """Exit status, output and errors of Python code."""
    command = [sys.executable, "-c", f"import signal, sys; sys.argv = ['x.py']\n{program}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return run.returncode, run.stdout, run.stderr


@pytest.mark.usefixtures("heed_ctrl_c")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: Path(path).name)
def test_ctrl_c_during_imports(program):
    interrupted = IMPORTS_INTERRUPTED.replace("PROGRAM", repr(program))
    assert ended(interrupted) == (130, "", f"{Path(program).name}: interrupted\n")


@pytest.mark.usefixtures("heed_ctrl_c")
@pytest.mark.parametrize(
    ("program", "out"), [(SENT_IN_MAIN, ""), (SWALLOWED_BY_A_DESTRUCTOR, ""), (SENT_AT_THE_END, "result\n")]
)
def test_ctrl_c_is_one_line(program, out):
    assert ended(program) == (130, out, "x.py: interrupted\n")


def test_workers_leave_ctrl_c_to_their_program(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WITH_A_WORKER)
    command = [sys.executable, str(program)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "True\n", "")


def test_ignored_ctrl_c_stays_ignored():
    assert ended(IGNORED) == (0, "result\n", "")


def test_paths_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = train_resnet.parse(["--workdir=~/run", "--data-dir=~"])
    assert (config.run.workdir, config.storage.data_dir) == (tmp_path / "run", tmp_path)
    (tmp_path / "config.json").write_text('{"data_dir": "~/data"}')
    assert train_resnet.parse(["--config=~/config.json"]).storage.data_dir == tmp_path / "data"
    assert read_experiment(tmp_path).storage.data_dir == tmp_path / "data"
    found = at_home(PredictConfig(Path("~/run"), (Path("~/1.png"), Path("a~"), Path("~no user/x"))))
    assert found.workdir == tmp_path / "run"
    assert found.images == (tmp_path / "1.png", Path("a~"), Path("~no user/x"))
