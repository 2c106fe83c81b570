"""Lint, format, types and packaging: `pytest` runs every check there is."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import anact_jax

ROOT = Path(__file__).parents[1]


SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/*.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}
TOOLS = [
    "ruff check .",
    "ruff format --check .",
    "mypy",
    "zizmor --offline --quiet .github",
    *(f"check-jsonschema --builtin-schema vendor.{schema} {files}" for schema, files in SCHEMAS.items()),
]


@pytest.mark.parametrize("command", TOOLS)
def test_tool_finds_nothing(command):
    words = [str(path) for word in command.split() for path in (sorted(ROOT.glob(word)) if "*" in word else [word])]
    words[0] = str(Path(sysconfig.get_path("scripts")) / words[0])
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_pure_part_imports_no_flax():
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
    check = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    described = subprocess.run(check, capture_output=True, text=True)
    assert described.returncode == 0, described.stdout


IMPORT_ALL = """
import importlib, logging, pathlib, sys, threading
import dks.base.activation_transform, grain, matplotlib, orbax.checkpoint, tensorboardX, tensorflow_datasets, tyro
def settings():
    loggers = {name: logging.getLogger(name).level for name in (None, "absl", "asyncio", "jax", "tensorflow")}
    return loggers, sys.excepthook, sys.unraisablehook, threading.excepthook, logging.root.handlers[:]
before = settings()
for path in sorted(pathlib.Path("experiments").rglob("*.py")):
    if path.stem != "__init__":
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
    assert not any("/experiments/results/" in name for name in names)
    assert any(name.endswith("experiments/studies/results.py") for name in names)


def test_version_and_address_are_the_same_everywhere():
    citation, project = ((ROOT / name).read_text() for name in ("CITATION.cff", "pyproject.toml"))
    assert f"\nversion: {anact_jax.__version__}\n" in citation
    released = re.search(r"^date-released: (.*)$", citation, flags=re.MULTILINE)[1]
    assert f"\n## {anact_jax.__version__} ({released})\n" in (ROOT / "CHANGELOG.md").read_text()
    address = re.search(r"^repository-code: (.*)$", citation, flags=re.MULTILINE)[1]
    assert f'\nRepository = "{address}"\n' in project
    assert set(re.findall(r"https://github\.com/[\w-]+/anact_jax", citation + project)) == {address}


def test_workflows_run_what_is_run_here():
    here = (ROOT / ".ci" / "run").read_text() + (ROOT / "README.md").read_text()
    for command in ("mkdocs build", "python -m build", "pytest"):
        assert command in here
    tests, docs, release = (
        (ROOT / ".github" / "workflows" / f"{n}.yml").read_text() for n in ("tests", "docs", "release")
    )
    assert "- run: pytest ${OPTIONS}\n" in tests
    assert "- run: .ci/run\n" in tests
    assert "- run: mkdocs build --strict\n" in docs
    assert "- run: python -m build\n" in release
    oldest = re.search(r"jax>=([\d.]+)\", \"flax>=([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert f"jax=={oldest[1]}.0 flax=={oldest[2]}" in tests
    assert f"jax=={oldest[1]}.0 flax=={oldest[2]}" in here
