"""Labels of forms, by which results know them, and the objects that they mean.

In rows of results a form is a label that nothing takes apart. Labels of forms that are gone stay in the rows.
"""

from collections.abc import Mapping
from types import MappingProxyType

from anact_jax import Form, Published, Standardized

LAST_WITH_ALL_FORMS = "517581d"
"""The commit at which the forms that are gone can be run, by the commands of this one."""
WORDS: Mapping[str, Form] = MappingProxyType({"default": Standardized(), "published": Published()})

_STANDARDIZED = "forward+center+unit+diff+feature"
_CONSTANT = "forward+center+unit+feature"  # under differentiation
LABELS: Mapping[str, Form] = MappingProxyType(
    {
        "mean": Published(),
        "mean+center": Published(center=True),
        "mean+learned": Published(learned=True),
        "mean+center+learned": Published(center=True, learned=True),
        _STANDARDIZED: Standardized(std=1.0),
        f"{_STANDARDIZED}+level0.5": Standardized(),
        f"{_STANDARDIZED}+level0.7": Standardized(std=0.7),
        f"{_STANDARDIZED}+nu0.05": Standardized(std=1.0, tempering=0.05),
        f"{_STANDARDIZED}+nu0.1": Standardized(std=1.0, tempering=0.1),
        f"{_STANDARDIZED}+nu0.2": Standardized(std=1.0, tempering=0.2),
        f"{_STANDARDIZED}+nu0.1+level0.25": Standardized(std=0.25, tempering=0.1),
        f"{_STANDARDIZED}+nu0.1+level0.5": Standardized(tempering=0.1),
        f"{_STANDARDIZED}+nu0.1+level0.7": Standardized(std=0.7, tempering=0.1),
        f"{_CONSTANT}+level0.5": Standardized(stop_gradient=True),
        f"{_CONSTANT}+nu0.1+level0.5": Standardized(stop_gradient=True, tempering=0.1),
        "forward+center+unit+diff": Standardized(std=1.0, axis=None),
        "forward+center+unit+diff+nu0.1": Standardized(std=1.0, axis=None, tempering=0.1),
        "forward+center+unit": Standardized(std=1.0, axis=None, stop_gradient=True),
        "forward+unit": Standardized(std=1.0, center=False, axis=None, stop_gradient=True),
    }
)
_LABEL_OF = {form: label for label, form in LABELS.items()}


def label_of(form: Form) -> str:
    """The form's label; of one that has none in the table, the call that makes it."""
    return _LABEL_OF.get(form) or repr(form)


def label_named(name: str) -> str:
    """The label that `default`, `published` or a label itself names."""
    return label_of(WORDS[name]) if name in WORDS else name


def form_named(name: str) -> Form:
    """The form that `default`, `published` or a label of the table names.

    Raises:
        ValueError: no form has this name, or one that is gone.
    """
    label = label_named(name)
    if label not in LABELS:
        raise ValueError(
            f"unknown form {name!r}; expected default, published, or a label in experiments/forms.py; other labels in "
            f"results are of forms that are gone: commit {LAST_WITH_ALL_FORMS} is the last that runs them"
        )
    return LABELS[label]
