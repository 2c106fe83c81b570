"""What must work as the first thing that a process does."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PROGRAMS, ROOT

SHARD_MAP = """
import jax, jax.numpy as jnp
from anact_jax import anact, gaussian_stats
from anact_jax.statistics import Stats
from anact_jax import Published
jax.config.update("jax_num_cpu_devices", 8)
form = Published(center=True)
mesh = jax.make_mesh((8,), ("data",))
spec = jax.sharding.PartitionSpec
def loss(x, running):
    y, new = anact(jax.nn.gelu, x, running, form, axis_name="data")
    return jax.lax.psum(jnp.sum(jnp.sin(y)), "data"), new
with jax.set_mesh(mesh):
    running = Stats(*(jnp.full((), value) for value in (3.0, 0.0, 1.0, 0.3, 0.3, 0.5)))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (64, 4)), jax.NamedSharding(mesh, spec("data")))
    specs = {"in_specs": (spec("data"), spec()), "out_specs": (spec(), spec())}
    total, new = jax.jit(jax.shard_map(loss, **specs))(x, running)
y, expected = anact(jax.nn.gelu, jnp.asarray(jax.device_get(x)), jax.device_get(running), form)
print(max(float(abs(a - b).max()) for a, b in zip(jax.device_get(new), jax.device_get(expected))) < 1e-5)
print(abs(float(total) - float(jnp.sum(jnp.sin(y)))) < 1e-3)
"""

SCAN = """
import flax.linen as nn, jax, jax.numpy as jnp
from anact_jax.linen import NSwish
class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return NSwish(use_running_average=True)(nn.Dense(4)(x)), None
scan = nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)()
variables = scan.init(jax.random.key(0), jnp.ones((2, 4)), None)
print(variables["batch_stats"]["NSwish_0"]["count"].shape == (3, 4))
print(bool(jnp.isfinite(scan.apply(variables, jnp.ones((2, 4)), None)[0]).all()))
"""


@pytest.mark.parametrize("program", [SHARD_MAP, SCAN], ids=["shard_map under set_mesh", "init of a scan"])
def test_first_thing_in_a_process(program):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["True", "True"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: Path(path).name)
def test_a_missing_package_is_named_in_one_line(program):
    without = "import runpy, sys; sys.modules['tyro'] = sys.modules['optax'] = None; "
    run = without + "runpy.run_path(sys.argv[1], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", run, program], capture_output=True, text=True, check=False)
    expected = "the programs need optax, tyro; install them: pip install -e '.[experiments]'\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", expected)


RUN_WITHOUT = """
import importlib, pathlib, sys
sys.modules["dks"] = sys.modules["mnist1d"] = None  # importing them fails
for path in sorted(pathlib.Path("experiments").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
from experiments.data import DataError, load
from experiments.studies.rivals import Depth, deep_kernel_shaped
for use in (lambda: deep_kernel_shaped("tanh", Depth(12)), lambda: load("mnist1d")):
    try:
        use()
    except (ValueError, DataError) as error:
        print(error)
sys.argv[1:] = ["--model", "mlp5", "--norm", "none", "--epochs", "1", "--no-compare", "--workdir", sys.argv[1]]
from experiments import inspect_runs, predict, train_resnet
statuses = [train_resnet.main()]
sys.argv[1:] = sys.argv[-1:]
statuses += [predict.main(), inspect_runs.main()]
print(statuses)
"""


@pytest.mark.slow
def test_packages_of_one_study_can_be_missing(tmp_path):
    run = [sys.executable, "-c", RUN_WITHOUT, str(tmp_path / "run")]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Deep Kernel Shaping needs dks")
    assert lines[1].startswith("mnist1d needs mnist1d")
    assert lines[-1] == "[0, 0, 0]"
