"""The documentation's snippets run, its links lead somewhere, and its reference has every public name."""

import inspect
import json
import re
from pathlib import Path

import jax
import matplotlib
import pytest

import anact_jax
import anact_jax.diagnostics
import anact_jax.export
import anact_jax.health
import anact_jax.linen
import anact_jax.nnx
import anact_jax.plots
import anact_jax.theory

matplotlib.use("Agg")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
WITH_SNIPPETS = [page for page in PAGES if "```python" in page.read_text()]


def run(snippets, name):
    namespace = {"__name__": name}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for snippet in snippets:
            exec(compile(snippet, name, "exec"), namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: str(page.relative_to(DOCS)))
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_snippets_run(page):
    run(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL), page.name)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_notebook_runs_and_shows_the_difference():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    found = run(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"], NOTEBOOK.name)
    assert found["plain"][-1] < 0.2
    assert found["normalized"][-1] > 0.9
    assert found["yours"][-1] > 0.5
    matplotlib.pyplot.close("all")


def test_forms_in_the_text_can_be_made():
    texts = [path.read_text() for path in (*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md")]
    calls = {call for text in texts for call in re.findall(r"`((?:Standardized|Published|N[A-Z]\w+)\(.*?\))`", text)}
    names = vars(anact_jax) | vars(anact_jax.linen) | {"depth": 100, "train": True, "L": 0.5}
    made = [eval(call, dict(names)) for call in sorted(calls) if "..." not in call]
    assert len(made) > 10


def public_names():
    yield from (f"anact_jax.{name}" for name in anact_jax.__all__)
    for module in (
        anact_jax.linen,
        anact_jax.nnx,
        *(getattr(anact_jax, n) for n in ("diagnostics", "export", "health", "plots", "theory")),
    ):
        for name, value in vars(module).items():
            kind = inspect.isclass(value) or inspect.isfunction(value)
            if kind and (value.__module__, value.__name__) == (module.__name__, name) and not name.startswith("_"):
                yield f"{module.__name__}.{name}"


INTERNAL = {
    "anact_jax.linen.function_of",
    "anact_jax.linen.unbound",
    *(f"anact_jax.diagnostics.{name}" for name in ("Call", "Name", "measured_at")),
    "anact_jax.plots.plain_log_scale",
}


def test_reference_has_every_public_name():
    reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)$", reference, flags=re.MULTILINE))
    assert set(public_names()) - listed == INTERNAL


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_every_page_stands_in_the_navigation():
    navigation = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(navigation) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_pictures_are_stored_once_and_shown():
    pages = "\n".join(page.read_text() for page in (*PAGES, ROOT / "README.md"))
    pictures = [*(DOCS / "pictures").glob("*"), *(ROOT / "experiments" / "results").rglob("*.png")]
    assert len({picture.read_bytes() for picture in pictures}) == len(pictures) > 10
    assert [str(picture) for picture in pictures if picture.name not in pages] == []
