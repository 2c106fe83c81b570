"""The guide's snippets run, in order, those under one heading together."""

import re
from pathlib import Path

import jax
import pytest

GUIDE = (Path(__file__).parents[1] / "docs" / "guide.md").read_text()
SECTIONS = dict(section.split("\n", 1) for section in GUIDE.split("\n## ")[1:])


@pytest.mark.slow
@pytest.mark.parametrize("heading", [name for name, text in SECTIONS.items() if "```python" in text])
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_snippets_run(heading):
    namespace = {"__name__": "guide"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for snippet in re.findall(r"```python\n(.*?)```", SECTIONS[heading], flags=re.DOTALL):
            exec(compile(snippet, "guide.md", "exec"), namespace)
