"""Eight virtual CPU devices, strict promotion, and run-time checks of every annotated shape and type."""

import os
import signal
import sys

import jax
import matplotlib
import pytest
from hypothesis import settings
from jaxtyping import config, install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
os.environ["JAX_PLATFORMS"] = "cpu"  # for programs that tests start
matplotlib.use("Agg")

install_import_hook(["anact_jax", "experiments"], "beartype.beartype")

settings.register_profile("fast", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("fast")


def pytest_configure(config):
    """Fast tests are compiled fast; the slow ones, many of them the same on more cases, as users' programs are."""
    if config.option.markexpr == "not slow":
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def unchecked_types():
    """Lets wrong arguments through to the library's own checks."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def standard_promotion():
    """Lets integers and floats mix, as optax's schedules do."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def heed_ctrl_c():
    """Programs that the test starts heed SIGINT, even where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a program's `main` with arguments; returns its exit status and what it printed."""

    def run(program, *arguments):
        name = program.__name__.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return program.main(), capsys.readouterr()

    return run


@pytest.fixture
def refused(run_main):
    """Runs a program that must end with status 2 and one line that holds a message; returns what it printed."""

    def run(program, *arguments, message):
        status, output = run_main(program, *arguments)
        assert status == 2
        assert message in output.err
        assert output.err.count("\n") == 1
        return output

    return run
