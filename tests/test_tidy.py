"""Lint, format, types and packaging: `pytest` runs every check there is."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=lambda c: " ".join(c)
)
def test_tool_finds_nothing(command):
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_pure_part_imports_no_flax_and_no_experiments():
    code = "import anact_jax, sys; print([m for m in ('flax', 'optax', 'experiments') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_wheel_holds_only_the_library_with_its_types(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {"anact_jax"}
    assert "anact_jax/py.typed" in names
    assert "anact_jax/linen.py" in names


IMPORT_ALL = """
import importlib, logging, pathlib, sys, threading
import dks.base.activation_transform, grain, matplotlib, orbax.checkpoint, tensorboardX, tensorflow_datasets, tyro
def settings():
    loggers = {name: logging.getLogger(name).level for name in (None, "absl", "asyncio", "jax", "tensorflow")}
    return loggers, sys.excepthook, sys.unraisablehook, threading.excepthook, logging.root.handlers[:]
before = settings()
for path in sorted(pathlib.Path("experiments").rglob("*.py")):
    if path.stem not in ("__init__", "thirty_layers"):
        importlib.import_module(".".join(path.with_suffix("").parts))
print(settings() == before)
studies = [name for name in sys.modules if name.startswith("experiments.studies")]
print(len(studies) > 5)
"""


def test_imports_change_no_logger_and_no_hook():
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["True", "True"], run.stderr


def test_programs_need_no_package_of_the_rivals():
    code = "import experiments.train_resnet, sys; print([m for m in ('dks', 'autograd') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_source_distribution_holds_no_measured_runs(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert not any("/results/" in name for name in names)
    assert any(name.endswith("experiments/studies/grid.py") for name in names)
