"""Programs that train networks with `anact_jax` and report what they find.

Each imports from this package before it imports what may be missing, which is named here in one line. What one study or
one data set alone needs (`dks`, `mnist1d`) is asked for where it is used.
"""

import importlib.util

_EXTRAS = (  # packages by the names that they are imported by
    "absl", "grain", "matplotlib", "optax", "orbax", "PIL", "scipy", "sklearn", "tensorboardX", "tensorflow_datasets",
    "tqdm", "tyro",
)  # fmt: skip
_missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
if _missing:
    raise SystemExit(f"the programs need {', '.join(_missing)}; install them: pip install -e '.[experiments]'")
